"""Triton's depthwise convolution is the reference's, in every dtype, for every kind of call."""

import pytest
import torch
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import depthwise_conv


def _case(kernel, height, width, channels, batch=1, names=("x", "weight", "bias", "residual")):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, height, width, channels),
        "weight": (channels, 1, kernel, kernel),
        "bias": (channels,),
        "residual": (batch, height, width, channels),
    }
    return {
        name: torch.randn(shapes[name], generator=generator, dtype=torch.float64).requires_grad_() for name in names
    }


def _low(tensors, dtype=torch.float32):
    return {name: t.detach().to(DEVICE, dtype) for name, t in tensors.items()}


CASES = {  # kernel, height, width, channels, batch
    "several tiles along each axis, channels that fill none": (3, 9, 9, 65, 1),
    "a kernel larger than the map": (5, 2, 3, 8, 1),
    "two channels": (3, 4, 3, 2, 1),
    "seven": (7, 4, 9, 16, 1),
    "the largest kernel": (11, 3, 4, 4, 1),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] if n in ("seven", "the largest kernel") else []) for n in CASES]
)
def test_is_as_exact_as_plain_torch(name):
    check_against_float64(depthwise_conv, _case(*CASES[name]))


def test_programs_that_sum_several_tiles_are_as_exact(monkeypatch):
    from visionzoo.kernels.depthwise_conv import triton

    monkeypatch.setattr(triton, "_WEIGHT_PROGRAMS", 2)
    check_against_float64(depthwise_conv, _case(3, 9, 9, 8, batch=2))


def test_taps_of_large_maps_are_laid_out_first(monkeypatch):
    from visionzoo.kernels.depthwise_conv import triton

    monkeypatch.setattr(triton, "_SMALL", 8)
    check_against_float64(depthwise_conv, _case(3, 5, 6, 12))


def test_columns_of_large_kernels_are_summed_by_several_programs(monkeypatch):
    from visionzoo.kernels.depthwise_conv import triton

    _, *sizes = triton._weight_grad_size(5, 4)
    monkeypatch.setattr(triton, "_weight_grad_size", lambda *_: (2, *sizes))
    monkeypatch.setattr(triton, "_BY_TILES", 3)
    check_against_float64(depthwise_conv, _case(5, 3, 4, 4, names=("x", "weight")))


@pytest.mark.parametrize("regions", [None, (2, 1)])
def test_rows_give_the_gradients_of_small_kernels_too(monkeypatch, regions):
    from visionzoo.kernels.depthwise_conv import triton

    monkeypatch.setattr(triton, "_BY_TILES", 1)
    check_against_float64(depthwise_conv, _case(3, 6, 5, 4), regions=regions)


@pytest.mark.parametrize("names", [("x", "weight"), ("x", "weight", "bias"), ("x", "weight", "residual")])
def test_bias_and_residual_may_be_left_out(names):
    check_against_float64(depthwise_conv, _case(3, 5, 6, 12, names=names))


@pytest.mark.parametrize("regions", [(2, 3), (4, 1), (1, 6)])
def test_regions_are_convolved_by_themselves(regions):
    check_against_float64(depthwise_conv, _case(3, 4, 6, 8), regions=regions)


def test_x_may_be_its_own_residual():
    def plus_itself(x, **arguments):
        return depthwise_conv(x, residual=x, **arguments)

    check_against_float64(plus_itself, _case(3, 5, 6, 12, names=("x", "weight", "bias")))


def test_runs_repeat_bit_for_bit():
    check_repeats(depthwise_conv, _case(3, 5, 9, 8, batch=2))


def test_takes_views_of_one_projection_and_other_strides():
    tensors = _low(_case(5, 6, 7, 12))
    expected = depthwise_conv(**tensors, backend="reference")
    view = torch.cat([tensors["x"], tensors["x"]], -1)[..., 12:]
    out = depthwise_conv(**{**tensors, "x": view}, backend="triton")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    strided = {name: tensors[name].transpose(1, 3).contiguous().transpose(1, 3) for name in ("x", "residual")}
    out = depthwise_conv(**{**tensors, **strided}, backend="triton")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_upstream_gradients_may_have_any_strides():
    tensors = _low(_case(3, 5, 6, 8))
    grads = []
    for backend in ("reference", "triton"):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        depthwise_conv(**leaves, backend=backend).mean().backward()  # expanded from one number
        grads.append([t.grad for t in leaves.values()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


def test_only_wanted_gradients_are_computed():
    tensors = _low(_case(3, 5, 6, 8))
    expected = depthwise_conv(**tensors, backend="reference")
    for name in tensors:
        leaves = {**tensors, name: tensors[name].clone().requires_grad_()}
        out = depthwise_conv(**leaves, backend="triton")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        out.sum().backward()
        assert leaves[name].grad.abs().sum() > 0


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_autocast_reads_what_it_gets_and_rounds_once(residual):
    tensors = _low(_case(3, 5, 6, 8))
    tensors["residual"] = tensors["residual"].to(residual)
    exact = depthwise_conv(**{name: t.double() for name, t in tensors.items()})
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        out = depthwise_conv(**leaves, backend="triton")
    assert out.dtype == residual
    torch.testing.assert_close(out, exact.to(residual), rtol=1e-5 if residual == torch.float32 else 8e-3, atol=1e-5)
    out.sum().backward()
    assert all(t.grad.dtype == t.dtype for t in leaves.values())


@pytest.mark.parametrize("itself", [False, True])
def test_compiles_as_one_graph_with_gradients(itself):
    tensors = _low(_case(3, 5, 6, 8))

    def conv(x, weight, bias, residual):
        residual = x if itself else residual
        return depthwise_conv(x * 2, weight, bias, residual=residual, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for function in (conv, compiled):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        out = function(**leaves)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in leaves.values() if t.grad is not None)])
    torch.testing.assert_close(results[1], results[0])


def test_too_large_kernels_are_refused_by_name_and_fall_back_else():
    tensors = _low(_case(13, 4, 4, 4))
    with pytest.raises(ValueError, match="cannot run: its kernels take kernels up to 11, got 13"):
        depthwise_conv(**tensors, backend="triton")
    torch.testing.assert_close(depthwise_conv(**tensors), depthwise_conv(**tensors, backend="reference"))
