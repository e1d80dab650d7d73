"""Relational heads against their definition token by token, and the symbols that they tag tokens with."""

import math

import pytest
import torch
from torch import Tensor

from visionzoo.layers.mixers import DualAttentionMixer, dual_attention
from visionzoo.layers.symbols import PositionalSymbols, RelationalSymbols, RelativeSymbols

OPTIONS = [
    {},
    {"relational_heads": 2, "num_relations": 4, "symmetric_relations": True, "relation_activation": "sigmoid"},
    {"symbols": {"type": "position_relative", "max_distance": 3}},
    {"symbols": {"type": "positional", "max_length": 9}},
]


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_relational_heads_see_relations_and_symbols(options):
    torch.manual_seed(0)
    mixer = DualAttentionMixer(8, 2, **options).double()
    x = 3 * torch.randn(2, 2, 3, 8, dtype=torch.float64)
    heads, relations, kind = mixer.relational_heads, mixer.num_relations, options.get("symbols", {})
    act = mixer.ACTIVATIONS[mixer.relation_activation]
    expected = torch.zeros(2, 6, heads, 4, dtype=torch.float64)
    for sample in range(2):
        tokens = x[sample].view(6, 8)
        q, k = mixer.relational_qk(tokens).view(6, 2, heads, 4).unbind(1)
        pair = mixer.relation_qk(tokens).view(6, -1, relations, 4 * heads // relations)
        symbols = mixer.symbol_v(mixer.symbols(tokens[None])).view(-1, heads, 4)
        for i in range(6):
            r = torch.stack([(pair[i, 0] * pair[j, -1]).sum(-1) for j in range(6)]) / math.sqrt(pair.shape[-1])
            for g in range(heads):
                weights = torch.stack([q[i, g] @ k[j, g] / 2 for j in range(6)]).softmax(0)
                for j in range(6):
                    place = j - i + 5 if kind.get("type") == "position_relative" else j
                    expected[sample, i, g] += weights[j] * (mixer.relation_v[g] @ act(r[j]) + symbols[place, g])
    out = mixer(x).flatten(1, 2)[..., -4 * heads :]
    torch.testing.assert_close(out, mixer.relational_proj(expected.flatten(2)), rtol=1e-12, atol=1e-12)
    if heads == 1:  # beside one of self-attention
        q, k, v = mixer.qkv(x.flatten(1, 2)).chunk(3, -1)
        own = mixer.proj((q @ k.mT / 2).softmax(-1) @ v)
        torch.testing.assert_close(mixer(x).flatten(1, 2)[..., :4], own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_queries_in_parts_are_all_of_them(options, monkeypatch):
    torch.manual_seed(0)
    mixer = DualAttentionMixer(8, 2, **options).double()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64, requires_grad=True)
    whole = mixer(x)
    (grad,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(dual_attention, "MAX_STRIDE", 35 * 35 - 1)
    monkeypatch.setattr(dual_attention, "QUERIES", 16)
    split, parts = Tensor.split, []
    monkeypatch.setattr(Tensor, "split", lambda t, *args: parts.append(split(t, *args)) or parts[-1])
    out = mixer(x)
    assert [len(p) for p in parts] == [3, 3]  # of weights and relations
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], grad, rtol=1e-10, atol=1e-10)


def test_symbols_of_distances_are_clipped():
    symbols = RelativeSymbols(4, max_distance=2)
    table = symbols(torch.zeros(1, 5, 4))
    assert torch.equal(table, symbols.table[[0, 0, 0, 1, 2, 3, 4, 4, 4]])  # distances -4 to 4


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [-1, -2]),
        ({"include_self": True}, [0, -1, -2]),
        ({"causal": False}, [-2, -1, 1, 2]),
        ({"causal": False, "include_self": True}, [-2, -1, 0, 1, 2]),
    ],
)
@torch.no_grad()
def test_symbols_of_relations_are_those_of_neighbors(options, steps):
    symbols = RelationalSymbols(8, relation_heads=2, neighbors=2, normalize=False, **options).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k = symbols.q(x).view(5, 2, 4), symbols.k(x).view(5, 2, 4)
    near = [torch.stack([(q[i] * k[min(max(i + s, 0), 4)]).sum(-1) for s in steps]).flatten() for i in range(5)]
    expected = symbols.symbolic(symbols.proj(torch.stack(near))[None])
    torch.testing.assert_close(symbols(x), expected, rtol=1e-12, atol=1e-12)


def test_symbols_of_places_are_for_so_many_tokens():
    with pytest.raises(ValueError, match=r"PositionalSymbols: expected at most 4 tokens, got 5; pass a larger max_len"):
        PositionalSymbols(8, max_length=4)(torch.zeros(1, 5, 8))
