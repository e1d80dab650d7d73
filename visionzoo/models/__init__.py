"""The families; importing this registers them into timm."""

from visionzoo.models import (
    biformer,
    cswin,
    davit,
    dinat,
    flatten,
    halonet,
    levit,
    litv2,
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
    "litv2",
    "nat",
    "poolformer",
    "pvt",
    "pvtv2",
    "shvit",
    "stvit",
    "swin",
]
