"""mmcv's ops come from visionzoo.openmmlab, so it is imported first."""

import importlib.util

if importlib.util.find_spec("mmengine"):
    import visionzoo.openmmlab  # noqa: F401
