"""Linear attention is what its docstring says, by an oracle that forms every weight, and never overflows."""

import pytest
import torch

from visionzoo.kernels import linear_attention

MAPS = ["relu", "elu", "softmax", "focused", "identity"]


def _qkv(size=(3, 4), key_size=None, heads=2, dim=5, value_dim=None, feature_map=""):
    generator = torch.Generator().manual_seed(0)
    sizes = [(size, dim), (key_size or size, dim), (key_size or size, value_dim or dim)]
    q, k, v = (torch.randn(2, *s, heads, d, generator=generator, dtype=torch.float64) for s, d in sizes)
    return (q.abs(), k.abs(), v) if feature_map == "identity" else (q, k, v)


def _focused(token, power, temperature):
    """Features of one token [G, D], as the paper writes them: lengths over all heads."""
    t = (token.clamp(min=0) + 1e-6) / temperature
    return t**power * (t.square().sum().sqrt() / (t**power).square().sum().sqrt())


def _loops(q, k, v, feature_map, power=3.0, temperature=1.0, eps=1e-6):
    """All weights of all pairs, one sample and head after the other; and their means over the keys."""
    out, means = torch.zeros_like(q[..., :1]).repeat(1, 1, 1, 1, v.shape[-1]), torch.zeros_like(q[..., 0])
    for b in range(q.shape[0]):
        queries, keys, values = (t[b].flatten(0, 1) for t in (q, k, v))  # [N, G, D]
        if feature_map == "focused":
            queries, keys = (torch.stack([_focused(token, power, temperature) for token in t]) for t in (queries, keys))
        for g in range(q.shape[3]):
            fq, fk = queries[:, g], keys[:, g]
            if feature_map == "relu":
                fq, fk = fq.clamp(min=0), fk.clamp(min=0)
            elif feature_map == "elu":
                fq, fk = (torch.where(t > 0, t + 1, t.exp()) for t in (fq, fk))
            elif feature_map == "softmax":
                fq = torch.stack([row.exp() / row.exp().sum() for row in fq])
                fk = torch.stack([column.exp() / column.exp().mean() for column in fk.T]).T
            weights = fq @ fk.T  # [N, N']
            means[b, :, :, g] = weights.mean(1).view(q.shape[1:3])
            weights = weights / (weights.sum(1, keepdim=True) + eps * len(fk))
            out[b, :, :, g] = (weights @ values[:, g]).view(*q.shape[1:3], -1)
    return out, means


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("value_dim", [5, 3])
@pytest.mark.parametrize("key_size", [None, (2, 3)], ids=["same map", "smaller map of keys"])
def test_weights_are_products_of_features(feature_map, key_size, value_dim):
    q, k, v = _qkv(key_size=key_size, value_dim=value_dim, feature_map=feature_map)
    out, weights = linear_attention(q, k, v, feature_map=feature_map, return_weights=True)
    expected = _loops(q, k, v, feature_map)
    torch.testing.assert_close((out, weights), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(out, linear_attention(q, k, v, feature_map=feature_map))


def test_focus_has_a_power_a_temperature_and_an_epsilon():
    q, k, v = _qkv()
    temperature = torch.rand(2, 5, dtype=torch.float64) + 0.5
    options = {"temperature": temperature, "eps": 0.1}
    out = linear_attention(q, k, v, feature_map="focused", focusing_factor=4.0, **options)
    torch.testing.assert_close(out, _loops(q, k, v, "focused", power=4.0, **options)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_gradients_are_those_of_finite_differences(feature_map):
    q, k, v = (t.requires_grad_() for t in _qkv(size=(2, 3), value_dim=3, feature_map=feature_map))
    temperature = [torch.rand(2, 5, dtype=torch.float64).add(0.5).requires_grad_()] if feature_map == "focused" else []

    def attention(q, k, v, *temperature):
        options = {"temperature": temperature[0]} if temperature else {}
        return linear_attention(q, k, v, feature_map=feature_map, return_weights=True, **options)

    assert torch.autograd.gradcheck(attention, (q, k, v, *temperature), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_half_precision_is_finite_and_exact_at_detection_sizes(feature_map, dtype):
    """65,536 tokens with activations times ten: a sum of features in float16 overflows, as its cube does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = ((torch.randn(1, 256, 256, 2, 8, generator=generator) * 10).to(dtype) for _ in range(3))
    if feature_map == "identity":
        q, k = q.float().abs(), k.float().abs()
    out = linear_attention(q, k, v, feature_map=feature_map)
    exact = linear_attention(q.double(), k.double(), v.double(), feature_map=feature_map)
    assert out.dtype == dtype and out.isfinite().all()
    assert (out.double() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()


def test_gradients_in_half_precision_are_finite_at_detection_sizes():
    q, k, v = ((torch.randn(1, 256, 256, 2, 8) * 10).half().requires_grad_() for _ in range(3))
    linear_attention(q, k, v, feature_map="focused").square().mean().mul(1000).backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in (q, k, v))


def test_tokens_without_any_positive_number_stay_finite():
    q, k, v = (t.float().requires_grad_() for t in _qkv())
    temperature = torch.full((2, 5), 100.0)
    out = linear_attention(-q.abs(), -k.abs(), v, feature_map="focused", temperature=temperature)
    out.sum().backward()
    assert out.isfinite().all() and all(t.grad.isfinite().all() for t in (q, k, v))
    assert not linear_attention(-q.abs(), -k.abs(), v, feature_map="relu").any()


def test_autocast_does_not_reach_the_sums():
    q, k, v = (t.float() for t in _qkv(size=(40, 40)))
    expected = linear_attention(q, k, v, feature_map="focused")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v, feature_map="focused"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 10)}, r"must be \[B, H, W, G, D\] with the same B, G and D, got \(2, 3, 4, 10\)"),
        ({"k": torch.zeros(2, 2, 2, 2, 5).double()}, r"but for the width, \[2, 2, 2, 2\] and V.*got \[2, 3, 4, 2, 5\]"),
        ({"k": torch.zeros(2, 3, 4, 2, 5)}, r"share a floating dtype and a device, got torch\.float64 on cpu"),
        ({"v": torch.zeros(2, 3, 4, 2, 7)}, r"torch\.float64 on cpu; got \[2, 3, 4, 2, 7\], torch\.float32 on cpu"),
        (
            {"q": torch.zeros(2, 3, 4, 2, 5), "k": torch.zeros(2, 3, 4, 2, 5), "feature_map": "identity"},
            r"torch\.float32 on cpu, or of lower precision; got \[2, 3, 4, 2, 5\], torch\.float64",
        ),
        ({"feature_map": "cosine"}, r"unknown feature_map='cosine', expected one of \('relu', 'elu'"),
        ({"focusing_factor": 0}, r"focusing_factor must be positive.*focusing_factor=0"),
        ({"eps": -1.0}, r"eps not negative, got .*eps=-1\.0"),
        ({"temperature": torch.ones(2, 5)}, r"temperature is for feature_map='focused'.*got feature_map='relu'"),
        ({"temperature": torch.ones(5), "feature_map": "focused"}, r"\[G, D\] = \[2, 5\] on cpu; got .*\(5,\)"),
        ({"backend": "triton"}, r"backend 'triton' cannot run: "),
    ],
)
def test_wrong_arguments_are_named(change, message):
    q, k, v = _qkv()
    with pytest.raises(ValueError, match=message):
        linear_attention(**{"q": q, "k": k, "v": v, **change})
