"""SHViT's attention is what its formula says, on any map."""

import math

import pytest
import torch
from quick import draw_weights

from visionzoo.layers.mixers.single_head import SingleHeadMixer


def _linear_norm(pair, x):
    y = x @ pair.linear.weight.T
    norm = pair.norm
    return (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("partial_dim", [5, 12])
@torch.no_grad()
def test_attention_is_its_formula(partial_dim):
    torch.manual_seed(0)
    mixer = draw_weights(SingleHeadMixer(12, partial_dim=partial_dim, qk_dim=3)).double().eval()
    mixer.qkv.norm.running_mean.normal_()
    mixer.proj.norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 4, 3, 12, dtype=torch.float64)
    out = mixer(x)
    for sample, result in zip(x, out, strict=True):
        part, rest = sample[..., :partial_dim], sample[..., partial_dim:]
        part = (part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt() * mixer.norm.weight + mixer.norm.bias
        tokens = _linear_norm(mixer.qkv, part.flatten(0, 1))
        attended = []
        for query in tokens:
            weights = torch.stack([query[:3] @ key[3:6] / math.sqrt(3) for key in tokens]).exp()
            attended.append(sum(w * t[6:] for w, t in zip(weights / weights.sum(), tokens, strict=True)))
        joined = torch.cat([torch.stack(attended).view(4, 3, partial_dim), rest], -1)
        torch.testing.assert_close(result, _linear_norm(mixer.proj, joined.clamp(min=0)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dim", "width"), [(224, 48), (308, 66), (352, 75), (336, 72), (448, 96), (3, 1)])
def test_default_part_is_the_paper_s(dim, width):
    assert SingleHeadMixer(dim).partial_dim == width


def test_heads_of_the_shared_signature_are_ignored():
    assert SingleHeadMixer(12, 5)(torch.randn(2, 3, 3, 12)).shape == (2, 3, 3, 12)


@pytest.mark.parametrize("options", [{"partial_dim": 0}, {"partial_dim": 13}, {"qk_dim": 0}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        SingleHeadMixer(12, **options)
