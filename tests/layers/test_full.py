"""Heads of queries that share keys and values are torch's grouped queries."""

import pytest
import torch
import torch.nn.functional as F

from visionzoo.layers.mixers.full import FullMixer, mean_pooled_heads


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_keys_are_torchs_grouped_queries(kv_heads):
    torch.manual_seed(0)
    mixer = FullMixer(16, 4, kv_heads=kv_heads, qkv_bias=True).double()
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    qkv = mixer.qkv(x.flatten(1, 2)).unflatten(-1, (-1, 4)).transpose(1, 2)
    q, k, v = qkv.split([4, kv_heads, kv_heads], 1)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    expected = mixer.proj(expected)
    torch.testing.assert_close(mixer(x).flatten(1, 2), expected)
    torch.testing.assert_close(mixer.mix_first(x.flatten(1, 2)), expected[:, :1])
    scores = mixer(x, score="received_attention")[1]
    weights = (q @ k.repeat_interleave(4 // kv_heads, 1).mT / 2).softmax(-1)
    torch.testing.assert_close(scores, weights.mean((1, 2)))


@torch.no_grad()
def test_pooled_heads_are_means_and_change_nothing_where_heads_are_alike():
    torch.manual_seed(0)
    shared = FullMixer(16, 4, kv_heads=2, qkv_bias=True).double()
    whole = FullMixer(16, 4, qkv_bias=True).double()
    whole.proj.load_state_dict(shared.proj.state_dict())
    for name in ("weight", "bias"):
        q, k, v = getattr(shared.qkv, name).split([16, 8, 8])
        repeated = [t.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v)]
        getattr(whole.qkv, name).copy_(torch.cat([q, *repeated]))
        torch.testing.assert_close(mean_pooled_heads(getattr(whole.qkv, name), 4, 2), getattr(shared.qkv, name))
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(whole(x), shared(x))
    rows = torch.arange(12.0)
    assert mean_pooled_heads(rows, 4, 2).tolist() == [0, 1, 2, 3, 4.5, 6.5, 8.5, 10.5]
    with pytest.raises(ValueError, match=r"got num_heads=4, kv_heads=3 and a weight of \(12,\)"):
        mean_pooled_heads(rows, 4, 3)
