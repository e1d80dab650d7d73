"""torch's counter of operations sees those of the Triton operators: as many as their definition has."""

import subprocess
import sys
from math import prod

import pytest
import torch
from kernels.calls import HEAD_DIM, HEADS, KINDS
from kernels.triton_checks import DEVICE
from torch.utils.flop_counter import FlopCounterMode

from visionzoo.kernels import depthwise_conv, neighborhood_attention, use_backend

SIZE = (2, 8, 8)


def _count(backend, function, *leaves, **parameters):
    """Operations forward, and backward for all leaves and parameters."""
    tensors = [t.detach().requires_grad_() for t in leaves]
    learned = {name: t.detach().requires_grad_() for name, t in parameters.items()}
    with use_backend(backend), FlopCounterMode(display=False) as counter:
        out = function(*tensors, **learned)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    return forward, counter.get_total_flops()


def _maps(count=3):
    return [torch.randn(*SIZE, HEADS, HEAD_DIM, device=DEVICE) for _ in range(count)]


@pytest.mark.parametrize("name", [name for name in KINDS if "neighborhood" not in name and "convolution" not in name])
def test_kernels_have_the_operations_of_their_reference(name):
    parameters = {n: torch.randn(shape, device=DEVICE) for n, shape in KINDS[name].parameters.items()}
    maps = _maps()
    counted = _count("triton", KINDS[name].function, *maps, **parameters)
    assert counted == _count("reference", KINDS[name].function, *maps, **parameters)
    assert ((counted[0] > 0 and counted[1] == 2 * counted[0]) or "norm" in name) or "routed" in name


def test_neighbors_outside_of_a_window_do_not_count():
    """The reference cuts the map into tiles and masks; the definition has k² keys for each query."""
    q, k, v = _maps()
    counted = _count(
        "triton", lambda q, k, v: neighborhood_attention(q, k, v, kernel_size=(3, 5), dilation=(2, 1)), q, k, v
    )
    forward = 2 * 2 * prod(SIZE) * 15 * HEADS * HEAD_DIM
    assert counted == (forward, 2 * forward)


@pytest.mark.parametrize("learned", [("x",), ("weight",), ("x", "weight")])
def test_depthwise_convolutions_count_a_product_for_each_tap(learned):
    """torch's own count of the backward pass takes a depthwise convolution for one that mixes channels."""
    tensors = {"x": torch.randn(*SIZE, 6, device=DEVICE), "weight": torch.randn(6, 1, 3, 3, device=DEVICE)}
    leaves = {name: t.requires_grad_(name in learned) for name, t in tensors.items()}
    with FlopCounterMode(display=False) as counter:
        out = depthwise_conv(**leaves, backend="triton")
    forward = 2 * prod(SIZE) * 6 * 9
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as plain:
        depthwise_conv(**leaves, backend="reference")
    assert plain.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == forward * len(learned)


def test_counters_made_before_the_first_call_count_it():
    code = (
        "import torch; from torch.utils.flop_counter import FlopCounterMode\n"
        "from visionzoo.kernels import routed_attention\n"
        "counter = FlopCounterMode(display=False)\n"
        f"q = torch.randn(1, 4, 4, 1, 16, device='{DEVICE}')\n"
        "with counter:\n"
        "    routed_attention(q, q, q, None, regions=2, backend='triton')\n"
        "print(counter.get_total_flops())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 4 * 16 * 4 * 16
