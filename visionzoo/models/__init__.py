"""The families; importing this registers them into timm."""

from visionzoo.models import biformer, cswin, davit, flatten, poolformer, pvt, pvtv2, swin

__all__ = ["biformer", "cswin", "davit", "flatten", "poolformer", "pvt", "pvtv2", "swin"]
