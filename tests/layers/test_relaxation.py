"""Relaxed attention is attention with smoothed weights, in training only, in every mixer that says so."""

import pytest
import torch
from layers.test_mixers import _spec

from visionzoo.layers.mixers import MIXERS, base, build_mixer
from visionzoo.layers.relaxation import Relaxation, relax_attention

ABLE = [name for name, kind in MIXERS.items() if kind.RELAXES]
# Those whose keys are not all tokens: what of them makes queries, so that without it all weights are equal.
PARTIAL = [
    {"type": "window", "window_size": 3, "shift_size": 1, "relative_position_bias": True},
    {"type": "window", "window_size": 3, "mask_padding": True},
    {"type": "cross_window", "stripe_width": 2},
    {"type": "routed", "regions": 2, "topk": 4},
    {"type": "neighborhood", "kernel_size": 3, "dilation": 2},
    {"type": "halo", "block_size": 4, "halo_size": 1, "mask_padding": True},
    {"type": "hilo", "window_size": 2},
    {"type": "full", "qkv_bias": True},
    {"type": "score", "normalizer": "sparsemax"},
]


def smoothed(gamma):
    """Attention of smoothed weights, from their definition."""

    def attend(q, k, v, *, bias=None, scale=None):
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if bias is None else scores + bias
        seen = scores.isfinite().to(scores.dtype)
        return ((1 - gamma) * scores.softmax(-1) + gamma * seen / seen.sum(-1, keepdim=True)) @ v

    return attend


def both(mixer, x, **beside):
    """The output and its gradients."""
    x = x.clone().requires_grad_()
    out = mixer(x, **beside)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *mixer.parameters()], allow_unused=True)]


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        *(
            (name, False)
            for name in ("full", "spatial_reduction", "embedding_free", "levit", "single_head", "subspace")
        ),
        *((name, True) for name in ("full", "spatial_reduction", "subspace")),
    ],
)
def test_it_is_attention_with_smoothed_weights(name, hidden, monkeypatch):
    torch.manual_seed(0)
    spec = {"type": name, "reduction": 1} if hidden and name == "spatial_reduction" else _spec(name)
    mixer = build_mixer(spec, 16, 2).double().train()
    x = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    beside = {"keep": torch.rand(2, 16) < 0.7} if hidden else {}
    plain = both(mixer, x, **beside)
    assert relax_attention(mixer, 0.3) == (1, 1)
    relaxed = both(mixer, x, **beside)
    relax_attention(mixer, 0)
    monkeypatch.setattr(base, "attend", smoothed(0.3))
    for one, other in zip(relaxed, both(mixer, x, **beside), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert (relaxed[0] - plain[0]).abs().max() > 1e-4


@pytest.mark.parametrize("spec", PARTIAL, ids=lambda spec: f"{spec}")
def test_wholly_relaxed_attention_is_that_of_queries_without_meaning(spec):
    torch.manual_seed(0)
    mixer = build_mixer(spec, 16, 2).double().train()
    x = torch.randn(1, 5, 7, 16, dtype=torch.float64)
    relax_attention(mixer, 1)
    relaxed = mixer(x)
    relax_attention(mixer, 0)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if "qkv" in name:
                parameter[: parameter.shape[0] // 3].zero_()
            elif name.split(".")[0] in ("q", "low_q", "relative_position_bias"):
                parameter.zero_()
    torch.testing.assert_close(relaxed, mixer(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", MIXERS)
def test_it_is_for_training_and_for_mixers_that_say_so(name):
    torch.manual_seed(0)
    mixer = build_mixer(_spec(name), 16, 2).double()
    x = torch.randn(2, 6, 6, 16, dtype=torch.float64)
    evaluated = mixer.eval()(x)
    changed, count = relax_attention(mixer, 0.5)
    assert (mixer.relaxation is not None) == (name in ABLE) and count >= changed >= (name in ABLE)
    assert torch.equal(mixer.eval()(x), evaluated)


def test_the_share_is_drawn_around_gamma_and_stays_a_share():
    torch.manual_seed(0)
    zeros, ones = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    shares = torch.cat([Relaxation(0.1, 0.1).relax(zeros, ones) for _ in range(500)])
    assert shares.min() == 0 and shares.max() <= 1 and 0.08 < shares.mean() < 0.13 and 0.06 < shares.std() < 0.1
    assert Relaxation(0.1).relax(zeros, ones) == 0.1


def test_numbers_out_of_range_are_named():
    with pytest.raises(ValueError, match="gamma from 0 to 1 and a spread from 0, got gamma=2 and spread=0"):
        relax_attention(torch.nn.Identity(), 2, 0)
