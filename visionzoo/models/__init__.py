"""The families; importing this registers them into timm."""

from visionzoo.models import (
    biformer,
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
    stvit,
    swin,
)

__all__ = [
    "biformer",
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
    "stvit",
    "swin",
]
