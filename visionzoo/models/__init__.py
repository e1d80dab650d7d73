"""The families; importing this registers them into timm."""

from visionzoo.models import biformer, cswin, davit, flatten, halonet, levit, poolformer, pvt, pvtv2, shvit, swin

__all__ = [
    "biformer",
    "cswin",
    "davit",
    "flatten",
    "halonet",
    "levit",
    "poolformer",
    "pvt",
    "pvtv2",
    "shvit",
    "swin",
]
