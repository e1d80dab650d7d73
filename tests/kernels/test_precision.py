"""References are as exact as they say: all in float32 at least, of whatever inputs, under autocast too."""

import pytest
import torch
from kernels.calls import HEAD_DIM, HEADS, KINDS

from visionzoo.kernels import use_backend
from visionzoo.testing import relative_error

LOW = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _reference():
    with use_backend("reference"):
        yield


def _inputs(kind, dtype, scale=1.0, size=(2, 8, 8)):
    """Maps and parameters whose numbers `dtype` represents; what a call transforms first stays in float64."""
    generator = torch.Generator().manual_seed(3)
    maps = [(torch.randn(*size, HEADS, HEAD_DIM, generator=generator) * scale).to(dtype) for _ in range(3)]
    exact = {"route_regions", "linear_attention"} & set(kind.operations)
    return maps, {
        name: (torch.randn(shape, generator=generator) / 4).to(torch.float64 if exact else dtype)
        for name, shape in kind.parameters.items()
    }


def _call(kind, inputs, dtype):
    maps, parameters = inputs
    return kind.function(
        *(t.to(dtype) for t in maps),
        **{name: t if t.dtype == torch.float64 else t.to(dtype) for name, t in parameters.items()},
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", KINDS)
def test_low_precision_differs_from_float64_by_the_rounding_of_the_output_alone(name, dtype):
    inputs = _inputs(KINDS[name], dtype)
    exact = _call(KINDS[name], inputs, torch.float64)
    out = _call(KINDS[name], inputs, dtype)
    assert out.dtype == dtype
    assert relative_error(out, exact) < 1.1 * relative_error(exact.to(dtype), exact)


@pytest.mark.parametrize("name", KINDS)
def test_under_autocast_inputs_in_float32_are_computed_as_without(name):
    inputs = _inputs(KINDS[name], torch.float32)
    exact = _call(KINDS[name], inputs, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = _call(KINDS[name], inputs, torch.float32)
    assert torch.equal(out, exact.to(out.dtype))


@pytest.mark.parametrize("name", [name for name in KINDS if "norm" not in name and "convolution" not in name])
def test_scores_beyond_the_largest_number_of_float16_are_finite(name):
    kind = KINDS[name]
    inputs = _inputs(kind, torch.float16, scale=1e3)
    maps = inputs[0]
    assert (maps[0].double() * maps[1].double()).sum(-1).abs().max() > 65504
    exact = _call(kind, inputs, torch.float64)
    for t in maps:
        t.requires_grad_()
    out = _call(kind, inputs, torch.float16)
    assert relative_error(out.detach(), exact) < 1e-3
    grads = torch.autograd.grad(out, maps, torch.full_like(out, 1e-3), allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
