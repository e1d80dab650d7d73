"""The families; importing this registers them into timm."""

from visionzoo.models import biformer, davit, halonet, levit, poolformer, shvit

__all__ = ["biformer", "davit", "halonet", "levit", "poolformer", "shvit"]
