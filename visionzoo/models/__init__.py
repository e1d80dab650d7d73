"""The families; importing this registers them into timm."""

from visionzoo.models import biformer, davit, poolformer

__all__ = ["biformer", "davit", "poolformer"]
