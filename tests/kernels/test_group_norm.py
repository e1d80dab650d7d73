"""Group normalization with one group is torch's, and as exact in Triton as in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import group_norm


def _case(*shape, mean=2.0):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[-1:], shape[-1:])
    )
    tensors = {"x": x.mul(3).add(mean), "weight": weight, "bias": bias}
    return {name: t.requires_grad_() for name, t in tensors.items()}


SHAPES = {
    "several parts of a sample": (2, 9, 17, 24),
    "one tile": (3, 2, 3, 64),
    "wide": (1, 2, 4, 1000),
    "two tokens": (2, 1, 2, 17),
}


@pytest.mark.parametrize(("name", "small"), [(name, 0) for name in SHAPES] + [("several parts of a sample", 2**15)])
def test_is_torchs_and_as_exact(name, small, monkeypatch):
    from visionzoo.kernels.group_norm import triton

    monkeypatch.setattr(triton, "_SMALL", small)  # numbers of maps that one kernel normalizes
    tensors = _case(*SHAPES[name])
    expected = F.group_norm(tensors["x"].permute(0, 3, 1, 2), 1, tensors["weight"], tensors["bias"], 1e-6)
    out = group_norm(**tensors, eps=1e-6)
    torch.testing.assert_close(out, expected.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)
    check_against_float64(group_norm, tensors, eps=1e-6)


def test_parts_of_several_tiles_are_as_exact(monkeypatch):
    from visionzoo.kernels.group_norm import triton

    monkeypatch.setattr(triton, "_SMALL", 0)
    monkeypatch.setattr(triton, "_PROGRAMS", 4)
    monkeypatch.setattr(triton, "_TILE", 64)
    check_against_float64(group_norm, _case(2, 5, 7, 12))


@pytest.mark.parametrize("small", [0, 2**15])
def test_large_means_cost_no_digits(small, monkeypatch):
    from visionzoo.kernels.group_norm import triton

    monkeypatch.setattr(triton, "_SMALL", small)
    tensors = {name: t.detach().float().to(DEVICE) for name, t in _case(2, 20, 20, 32, mean=1e4).items()}
    exact = group_norm(**{name: t.double() for name, t in tensors.items()})
    torch.testing.assert_close(group_norm(**tensors, backend="triton").double(), exact, rtol=1e-3, atol=1e-3)


def test_runs_repeat_bit_for_bit():
    check_repeats(group_norm, _case(2, 9, 17, 24))


def test_takes_a_part_of_the_channels_as_it_lies():
    tensors = {name: t.detach().float().to(DEVICE) for name, t in _case(2, 5, 6, 24).items()}
    part = {name: t[..., :9] for name, t in tensors.items()}
    expected = group_norm(**{name: t.contiguous() for name, t in part.items()}, backend="reference")
    torch.testing.assert_close(group_norm(**part, backend="triton"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast_gives_its_dtype_from_float32_weights(backend):
    tensors = {name: t.detach().float().to(DEVICE) for name, t in _case(2, 4, 6, 32).items()}
    exact = group_norm(**tensors, backend="reference")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = group_norm(**tensors, backend=backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.to(out.dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 8)}, r"weight and bias must be \[C\] for x \[B, H, W, C\], got .* for x \(2, 3, 8\)"),
        ({"weight": torch.ones(5)}, r"must be \[C\] for x \[B, H, W, C\], got \(5,\) and \(8,\)"),
        ({"x": torch.ones(2, 3, 3, 8).long()}, r"must be floating point on one device, got torch.int64"),
        ({"backend": "cuda"}, r"unknown backend 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        group_norm(**{"x": torch.ones(2, 3, 3, 8), "weight": torch.ones(8), "bias": torch.ones(8), **change})
