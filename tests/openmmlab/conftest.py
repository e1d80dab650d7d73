"""mmcv's ops come from visionzoo.openmmlab, so it is imported first."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("mmengine"):
    import visionzoo.openmmlab  # noqa: F401


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
