"""PVTv2, from the repository of PVT."""

from . import Recipe
from .pvt import PVT

RECIPES = {"pvtv2_b0": Recipe(PVT, "classification/pvt_v2.py", "pvt_v2_b0")}
