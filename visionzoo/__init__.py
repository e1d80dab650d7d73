"""visionzoo: vision backbones from the literature as one verified library, registered into timm."""

from visionzoo._version import __version__

__all__ = ["__version__"]
