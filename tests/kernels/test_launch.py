"""Launches of Triton kernels: compiled ones are kept, and never taken for other arguments than theirs."""

import pytest
import torch

from visionzoo.kernels import launch
from visionzoo.kernels.launch import head_rows, token_rows


class Kernel:
    """Stands for a Triton kernel: notes what it is asked to find, and what the found ones run."""

    def __init__(self):
        self.found, self.ran = [], []

    @staticmethod
    def fn(x, y, count, scale, WIDE, BLOCK):
        """Take the parameters of a kernel."""

    def __getitem__(self, grid):
        def find(*args, **options):
            number = len(self.found)
            self.found.append((grid, args, options))
            return Compiled(self, number)

        return find


class Compiled:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *args: self.kernel.ran.append((self.number, grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    return Kernel()


def test_a_compiled_kernel_is_kept_and_gets_new_numbers_and_its_constants(kernel):
    x = torch.zeros(64)
    launch.run(kernel, 3, x, None, 7, 0.5, BLOCK=16, num_warps=4, WIDE=True)
    y = torch.zeros(64)
    launch.run(kernel, 5, y, None, 7, 0.5, BLOCK=16, num_warps=4, WIDE=True)
    assert kernel.found == [((3,), (x, None, 7, 0.5), {"BLOCK": 16, "num_warps": 4, "WIDE": True})]
    ((number, grid, args),) = kernel.ran
    assert (number, grid) == (0, (5, 1, 1)) and args[0] is y and args[1:] == (None, 7, 0.5, True, 16)


x = torch.zeros(64, dtype=torch.float16)


@pytest.mark.parametrize(
    "args",
    [
        (x[8:], x, 16, 0.5),  # of the same kind as the first
        (x[1:], x, 16, 0.5),
        (x, x[1:], 16, 0.5),
        (x.bfloat16(), x, 16, 0.5),
        (x, None, 16, 0.5),
        (x, x, 17, 0.5),
        (x, x, 1, 0.5),
        (x, x, 2**40, 0.5),
        (x, x, 16.0, 0.5),
        (x, x, 16, 0.25),
    ],
)
def test_whatever_compilation_may_depend_on_makes_triton_look_again(kernel, args):
    launch.run(kernel, 1, x, x, 16, 0.5, WIDE=True, BLOCK=16)
    launch.run(kernel, 1, *args, WIDE=True, BLOCK=16)
    alike = args[0].data_ptr() == x[8:].data_ptr()
    assert len(kernel.found) == 2 - alike and len(kernel.ran) == alike


def test_each_device_has_its_own(kernel, monkeypatch):
    for device in (0, 1, 1):
        monkeypatch.setattr(torch.Tensor, "get_device", lambda _, device=device: device)
        launch.run(kernel, 1, x, x, 16, 0.5, WIDE=True, BLOCK=16)
    assert len(kernel.found) == 2 and len(kernel.ran) == 1


def test_options_and_kernels_are_told_apart(kernel):
    other = Kernel()
    for options in ({"BLOCK": 16, "num_warps": 2}, {"BLOCK": 16, "num_warps": 4}, {"BLOCK": 32, "num_warps": 4}):
        for one in (kernel, other):
            launch.run(one, 1, x, x, 16, 0.5, WIDE=True, **options)
    assert len(kernel.found) == len(other.found) == 3 and not kernel.ran and not other.ran


def test_what_is_kept_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_COMPILED", 2)
    for count in (3, 4, 5, 5):
        launch.run(kernel, 1, x, x, count, 0.5, WIDE=True, BLOCK=16)
    assert len(kernel.found) == 3 and len(kernel.ran) == 1 and len(launch._compiled) == 1


def test_the_interpreter_and_amd_keep_nothing(kernel, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    launch.run(kernel, 1, x, x, 16, 0.5, WIDE=True, BLOCK=16)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(kernel.__class__, "__getitem__", lambda self, grid: lambda *args, **options: None)
    launch.run(kernel, 1, x, x, 16, 0.5, WIDE=True, BLOCK=16)
    assert not launch._compiled


def test_maps_count_as_one_head():
    whole = torch.zeros(2, 3, 4, 24)
    part, narrow = whole[..., 8:16], whole[:, :, :3]
    for map_ in (whole, part, whole[:1, :1, 2:3, 8:16], whole[:, 1:2], whole[:0]):
        (rows, step), (same, as_head) = token_rows(map_), token_rows(map_[..., None, :])
        assert step == as_head and (rows is map_) == (same.data_ptr() == map_.data_ptr())
    rows, step = token_rows(part)
    assert rows is part and step == 24 and token_rows(narrow)[0].is_contiguous()
    assert head_rows(whole.unflatten(-1, (2, 12))[..., :5])[1:] == (24, 12)
