"""mmcv's ops come from visionzoo.openmmlab, so it is imported first."""

import importlib.util

import pytest

INSTALLED = importlib.util.find_spec("mmengine") is not None

if INSTALLED:
    import visionzoo.openmmlab  # noqa: F401


@pytest.fixture(autouse=True)
def loggers_of_one_test():
    """mmengine's loggers write to the standard output that they met first, and pytest closes that after the test."""
    yield
    if INSTALLED:
        from mmengine.logging import MMLogger

        MMLogger._instance_dict.clear()
