"""The families; importing this registers them into timm."""

from visionzoo.models import (
    biformer,
    convit,
    cpvt,
    cswin,
    davit,
    dinat,
    flatten,
    halonet,
    levit,
    nat,
    pcpvt,
    poolformer,
    pvt,
    pvtv2,
    shvit,
    swin,
)

__all__ = [
    "biformer",
    "convit",
    "cpvt",
    "cswin",
    "davit",
    "dinat",
    "flatten",
    "halonet",
    "levit",
    "nat",
    "pcpvt",
    "poolformer",
    "pvt",
    "pvtv2",
    "shvit",
    "swin",
]
