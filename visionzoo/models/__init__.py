"""The families; importing this registers them into timm."""

from visionzoo.models import (
    biformer,
    convit,
    cswin,
    davit,
    dinat,
    flatten,
    halonet,
    levit,
    nat,
    poolformer,
    pvt,
    pvtv2,
    shvit,
    swin,
)

__all__ = [
    "biformer",
    "convit",
    "cswin",
    "davit",
    "dinat",
    "flatten",
    "halonet",
    "levit",
    "nat",
    "poolformer",
    "pvt",
    "pvtv2",
    "shvit",
    "swin",
]
