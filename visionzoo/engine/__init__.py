"""Train, evaluate and predict classification on timm's parts; visionzoo/commands stands over it.

`options` and `flags` read the command line and YAML, `configs` finds configs by name, `data` has the images, `models`
builds and restores, `distillation` brings in a teacher, `training` is the loop with `checkpoints` and `reporting`,
`evaluation` and `prediction` use what it wrote.
"""

from visionzoo.engine.configs import is_openmmlab
from visionzoo.engine.errors import Interrupted, UnreadableImageError, UserError, run_tool

__all__ = ["Interrupted", "UnreadableImageError", "UserError", "is_openmmlab", "run_tool"]
