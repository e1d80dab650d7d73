"""Layer normalisation is torch's, as exact in Triton as in plain torch, and keeps autocast's dtype."""

import pytest
import torch
import torch.nn.functional as F
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import layer_norm


def _case(*shape):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[-1:], shape[-1:])]
    x, weight, bias = (t.requires_grad_() for t in draw)
    return {"x": x.detach().mul(3).add(2).requires_grad_(), "weight": weight, "bias": bias}


@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (70, 24), (3, 1000), (1, 1, 17)])
def test_is_torchs_and_as_exact(shape):
    tensors = _case(*shape)
    expected = F.layer_norm(tensors["x"], shape[-1:], tensors["weight"], tensors["bias"], 1e-6)
    torch.testing.assert_close(layer_norm(**tensors, eps=1e-6), expected, rtol=0, atol=0)
    check_against_float64(layer_norm, tensors, eps=1e-6)


def test_more_rows_than_programs_are_all_summed(monkeypatch):
    from visionzoo.kernels.layer_norm import triton

    monkeypatch.setattr(triton, "_PARTS", 3)
    tensors = {name: t.detach().float().to(DEVICE).requires_grad_() for name, t in _case(300, 1024).items()}
    grads = {}
    for backend in ("reference", "triton"):
        out = layer_norm(**tensors, backend=backend)
        grads[backend] = torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))
    for grad, expected in zip(*grads.values(), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_runs_repeat_bit_for_bit():
    check_repeats(layer_norm, _case(600, 24))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast_gives_its_dtype_from_float32_weights(backend):
    tensors = {name: t.detach().float().to(DEVICE) for name, t in _case(4, 6, 32).items()}
    exact = layer_norm(**tensors, backend="reference")
    with torch.autocast(DEVICE, dtype=torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        out = layer_norm(**tensors, backend=backend)
    assert out.dtype == (torch.float16 if DEVICE == "cuda" else torch.bfloat16)
    torch.testing.assert_close(out, exact.to(out.dtype), rtol=1e-2, atol=1e-2)
    mixed = layer_norm(tensors["x"].half(), tensors["weight"], tensors["bias"], backend=backend)
    assert mixed.dtype == torch.float16
    torch.testing.assert_close(mixed.float(), exact, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight and bias must be \[C\] for x \[..., C\], got \(5,\) and \(8,\)"),
        ({"x": torch.ones(2, 8).long()}, r"must be floating point on one device, got torch.int64"),
        ({"backend": "cuda"}, r"unknown backend 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(**{"x": torch.ones(2, 8), "weight": torch.ones(8), "bias": torch.ones(8), **change})


def test_too_wide_rows_are_refused_by_name():
    x = torch.ones(2, 1025, device=DEVICE)
    with pytest.raises(ValueError, match="its kernels take widths up to 1024, got 1025"):
        layer_norm(x, x[0], x[0], backend="triton")
