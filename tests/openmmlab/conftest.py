"""mmcv's ops come from visionzoo.openmmlab, so it is imported first."""

import functools
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


@pytest.fixture(scope="session", autouse=True)
def quick_configs():
    """mmengine lays out a config's text eight times a training, for a second each; it is the same Python without.

    It also reads mmdet's and mmseg's indexes, a hundred files, for each config that stands on one of theirs.
    """
    with pytest.MonkeyPatch.context() as patch:
        if INSTALLED:
            from mmengine.config import utils

            patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))
            patch.setattr(utils, "_get_cfg_metainfo", functools.cache(utils._get_cfg_metainfo))
        yield
