"""Sample sets that need no download."""

from visionzoo.data.digits import digits_folder

__all__ = ["digits_folder"]
