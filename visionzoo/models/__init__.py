"""The families; importing this registers them into timm."""

from visionzoo.models import biformer, davit, halonet, poolformer

__all__ = ["biformer", "davit", "halonet", "poolformer"]
