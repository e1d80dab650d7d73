"""The families; importing this registers them into timm."""

from visionzoo.models import biformer, davit, flatten, poolformer, swin

__all__ = ["biformer", "davit", "flatten", "poolformer", "swin"]
