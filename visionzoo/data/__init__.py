"""Sample sets that need no download."""

from visionzoo.data.digits import digits_folder
from visionzoo.data.scenes import scenes_folder

__all__ = ["digits_folder", "scenes_folder"]
