"""Channel attention is what its docstring says, and as exact in Triton as in plain torch."""

import pytest
import torch
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import channel_attention


def _case(*shape):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for name in "qkv"}


def _loops(q, k, v, scale):
    """One channel after the other, from the definition."""
    out = torch.zeros_like(q)
    batch, _, _, heads, dim = q.shape
    for b in range(batch):
        for g in range(heads):
            for d in range(dim):
                scores = torch.stack([(k[b, :, :, g, d] * v[b, :, :, g, e]).sum() * scale for e in range(dim)])
                out[b, :, :, g, d] = (scores.softmax(0) * q[b, :, :, g]).sum(-1)
    return out


@pytest.mark.parametrize("scale", [None, 0.1])
def test_channels_are_mixed_by_the_softmax_of_their_products(scale):
    tensors = {name: t.detach() for name, t in _case(2, 3, 5, 2, 4).items()}
    out = channel_attention(**tensors, scale=scale)
    torch.testing.assert_close(out, _loops(**tensors, scale=scale or 0.5), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(channel_attention, tuple(_case(1, 2, 3, 2, 4).values()), fast_mode=True)


SHAPES = {
    "several blocks": (2, 9, 10, 2, 32),
    "an odd width": (1, 5, 7, 3, 24),
    "one block": (2, 3, 4, 1, 16),
}


@pytest.mark.parametrize("name", SHAPES)
def test_is_as_exact_as_plain_torch(name):
    check_against_float64(channel_attention, _case(*SHAPES[name]), scale=0.1)


def test_parts_of_the_tokens_are_as_exact(monkeypatch):
    from visionzoo.kernels.channel_attention import triton

    for programs in (1, 10**6):  # all tokens in one part, and as many parts as can be
        monkeypatch.setattr(triton, "_PROGRAMS", programs)
        check_against_float64(channel_attention, _case(1, 11, 13, 1, 16), scale=0.1)


def test_runs_repeat_bit_for_bit():
    check_repeats(channel_attention, _case(2, 9, 10, 2, 32))


def test_takes_views_of_one_projection():
    projection = torch.randn(2, 6, 8, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    views = projection.unbind(3)
    expected = channel_attention(*(t.contiguous() for t in views), backend="reference")
    torch.testing.assert_close(channel_attention(*views, backend="triton"), expected, rtol=1e-5, atol=1e-5)


def test_compiles_as_one_graph_with_gradients():
    tensors = [t.detach().float().to(DEVICE) for t in _case(1, 5, 6, 2, 16).values()]

    def attend(q, k, v):
        return channel_attention(q * 2, k, v, backend="triton")

    torch._dynamo.reset()
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 5, 8)}, r"q, k and v must be \[B, H, W, G, D\] of one shape, got \(2, 3, 5, 8\)"),
        ({"k": torch.zeros(2, 3, 5, 2, 5)}, r"of one shape, got \(2, 3, 5, 2, 4\) and \(2, 3, 5, 2, 5\) and"),
        ({"v": torch.zeros(2, 3, 5, 2, 4).half()}, r"share a floating dtype .*torch.float32 on cpu and torch.float16"),
        ({"backend": "cuda"}, r"unknown backend 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        channel_attention(**{**{name: torch.zeros(2, 3, 5, 2, 4) for name in "qkv"}, **change})
