"""Triton's score attention is the reference's, in every dtype, for every normalizer."""

import pytest
import torch
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import score_attention
from visionzoo.kernels.score_attention import triton as kernels
from visionzoo.kernels.score_attention.api import NORMALIZERS


def _case(size=(3, 7), key_size=(5, 5), dim=12, factor=1.0):
    generator = torch.Generator().manual_seed(0)

    def draw(size):
        return torch.randn(1, *size, 2, dim, generator=generator, dtype=torch.float64)

    tensors = {"q": draw(size) * factor, "k": draw(key_size), "v": draw(key_size)}
    return {name: t.requires_grad_() for name, t in tensors.items()}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of few tokens."""
    sizes = kernels._sizes
    monkeypatch.setattr(kernels, "_sizes", lambda *given: sizes(*given)._replace(own=16, step=16))


@pytest.mark.parametrize("name", NORMALIZERS)
def test_is_as_exact_as_plain_torch(name):
    check_against_float64(score_attention, _case(), normalizer=name)


@pytest.mark.parametrize("name", ["softplus", "taylor"])
def test_large_scores_are_as_exact(name):
    """Far beyond what exponentials, or squares in float16, can hold."""
    check_against_float64(score_attention, _case((2, 2), (3, 6), factor=100.0), normalizer=name)


def test_gradients_below_what_float16_holds_count_where_the_output_is_float32():
    low = [t.detach().to(DEVICE, torch.float16) for t in _case((2, 2), (1, 9), factor=1e4).values()]
    grads = []
    for dtype, out_dtype, backend in (
        (torch.float16, torch.float32, "triton"),
        (torch.float64, torch.float64, "reference"),
    ):
        q, k, v = (t.to(dtype).requires_grad_() for t in low)
        out = score_attention(q, k, v, normalizer="relu", dtype=out_dtype, backend=backend)
        assert out.dtype == out_dtype
        grads.append(torch.autograd.grad((out * 1e-7).sum(), v)[0].double())
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


@pytest.mark.parametrize("name", ["sigmoid", "softplus"])
def test_runs_repeat_bit_for_bit(name):
    check_repeats(score_attention, _case((2, 4), (3, 6)), normalizer=name)


def test_takes_views_of_one_projection_and_other_strides():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 3, 2, 16, generator=generator).to(DEVICE).unbind(3)
    expected = score_attention(q, k, v, normalizer="sigmoid", backend="reference")
    views = [q, k.transpose(1, 2).contiguous().transpose(1, 2), v.transpose(3, 4).contiguous().transpose(3, 4)]
    out = score_attention(*views, normalizer="sigmoid", backend="triton")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_rows_by_descriptors_are_those_by_pointers(name, monkeypatch):
    """With a last block that is not full, of parts of projections."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3, 7, 3, 2, 16, generator=generator).to(DEVICE, torch.float16).requires_grad_()
    grad = torch.randn(2, 3, 7, 2, 16, generator=generator).to(DEVICE, torch.float16)
    asked, results = [], []
    described = kernels.described
    monkeypatch.setattr(kernels, "described", lambda *given: asked.append(given) or described(*given))
    for least in (1, 1024):
        monkeypatch.setattr(kernels, "_DESCRIBED_FROM", least)
        out = score_attention(*qkv.unbind(3), normalizer=name, backend="triton")
        results.append((out, *torch.autograd.grad(out, qkv, grad)))
        assert len(asked) == 3 + 4 + 4
    (out, *grads), (expected, *expected_grads) = results
    assert all(map(torch.equal, grads, expected_grads))
    rounding = {"rtol": 2e-3, "atol": 1e-4} if name == "sigmoid" else {"rtol": 0, "atol": 0}  # of other reciprocals
    torch.testing.assert_close(out, expected, **rounding)


@pytest.mark.parametrize("least", [1, 1024], ids=["descriptors", "pointers"])
def test_sigmoids_whose_powers_overflow_are_zeros(least, monkeypatch):
    monkeypatch.setattr(kernels, "_DESCRIBED_FROM", least)
    low = [t.detach().to(DEVICE, torch.float16) for t in _case((3, 7), (5, 5), dim=16, factor=100.0).values()]
    results = []
    for dtype, backend in ((torch.float16, "triton"), (torch.float64, "reference")):
        inputs = [t.to(dtype).requires_grad_() for t in low]
        out = score_attention(*inputs, normalizer="sigmoid", backend=backend)
        results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)
