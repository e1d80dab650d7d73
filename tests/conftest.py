"""Triton's kernels run on every machine: compiled on a GPU where there is one, else in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["VISIONZOO_SMALL_MAPS"] = ""  # tests run what their names say, whatever was measured on this GPU


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="refuse to start where not every test can run on a GPU")
    parser.addoption("--full", action="store_true", help="also run what smaller tests stand for")


def pytest_configure(config):
    if config.getoption("--gpu"):
        if not torch.cuda.is_available():
            raise pytest.UsageError("--gpu: torch sees no CUDA device here")
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise pytest.UsageError("--gpu: TRITON_INTERPRET=1 would interpret the kernels; unset it")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):  # pytest counts them as deselected
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small are faster on one thread, on a busy machine by ten times, and the same to the bit.

    For the session, since what a module's tests share is computed before a test's own fixtures.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
