"""Triton's linear attention is the reference's, in every dtype, for every feature map."""

import pytest
import torch
from kernels.triton_checks import DEVICE, check_against_float64, check_repeats

from visionzoo.kernels import linear_attention
from visionzoo.kernels.linear_attention import triton as kernels

MAPS = ["relu", "elu", "softmax", "focused"]
TEMPERATURE = ["focused with temperature"]


def _with_weights(*args, **options):
    """The output and, beside it, the mean weights: gradients come through both."""
    out, weights = linear_attention(*args, **options, return_weights=True)
    return torch.cat([out.float() if out.dtype != torch.float64 else out, weights[..., None]], -1)


def _of_features(q, k, v, **options):
    """Features are float32 whatever the values."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _with_weights(q.to(dtype), k.to(dtype), v, **options)


def _case(kind, size, key_size, heads, dim, mean=0.0, value_dim=None):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"q": draw(2, *size, heads, dim)}
    tensors |= {"k": draw(2, *key_size, heads, dim), "v": draw(2, *key_size, heads, value_dim or dim) + mean}
    feature_map = kind.split()[0]
    if feature_map == "identity":
        tensors |= {name: tensors[name].exp() for name in "qk"}
    if kind != feature_map:
        tensors["temperature"] = draw(heads, dim).sigmoid() + 0.5
    return {name: t.requires_grad_() for name, t in tensors.items()}, {"feature_map": feature_map}


@pytest.mark.parametrize("programs", [1024, 4], ids=["a block and a head each", "several blocks and heads each"])
@pytest.mark.parametrize("kind", MAPS + TEMPERATURE)
def test_is_as_exact_as_plain_torch(kind, programs, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    tensors, options = _case(kind, (6, 11), (10, 7), heads=2, dim=12)
    check_against_float64(linear_attention, tensors, **options)


@pytest.mark.parametrize(
    ("kind", "dim", "value_dim"),
    [
        ("relu", 3, 20),
        ("elu", 18, 5),
        ("identity", 3, 20),
    ],
)
def test_features_of_another_width_than_values_and_the_weights_are_as_exact(kind, dim, value_dim):
    tensors, options = _case(kind, (3, 7), (1, 19), heads=2, dim=dim, value_dim=value_dim)
    features = kind == "identity"
    check_against_float64(
        _of_features if features else _with_weights, tensors, **options, eps=0.0 if features else 1e-6
    )


def test_features_wider_than_the_kernels_come_in_parts(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_HEAD_DIM", 6)
    tensors, options = _case("identity", (2, 3), (1, 5), heads=2, dim=11, value_dim=4)
    with torch.no_grad():
        tensors["q"][:, 0, :, :, :6] = 0  # the first part's weights are 0
    check_against_float64(_of_features, tensors, **options, eps=0.0)


@torch.no_grad()
def test_given_features_may_be_wider_than_heads():
    q, k, v = (t.float().to(DEVICE) for t in _case("identity", (1, 2), (1, 3), 1, 129, value_dim=2)[0].values())
    out, expected = (linear_attention(q, k, v, feature_map="identity", backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_weights_need_no_output():
    q, k, v = (t.detach().float().to(DEVICE) for t in _case("elu", (2, 3), (2, 3), 1, 4)[0].values())
    grads = []
    for backend in ("reference", "triton"):
        given = q.clone().requires_grad_()
        linear_attention(given, k, v, feature_map="elu", return_weights=True, backend=backend)[1].sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", *(pytest.param(kind, marks=pytest.mark.full) for kind in TEMPERATURE)])
@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(3, 5, 18), (1, 40, 9), (1, 100, 100)])
def test_any_head_width_and_few_keys(heads, dim, value_dim, kind):
    tensors, options = _case(kind, (5, 7), (1, 9), heads, dim, value_dim=value_dim)
    check_against_float64(_with_weights, tensors, **options)


@pytest.mark.parametrize("factor", [*(pytest.param(factor, marks=pytest.mark.full) for factor in (0.5, 1, 8)), 2.5, 9])
def test_any_focusing_factor(factor):
    tensors, options = _case(TEMPERATURE[0], (3, 4), (3, 4), heads=2, dim=8)
    check_against_float64(linear_attention, tensors, **options, focusing_factor=factor)


@pytest.mark.parametrize("side", [4] + [32] * (DEVICE == "cuda"))
@pytest.mark.parametrize("kind", MAPS + TEMPERATURE)
def test_values_with_a_large_mean_leave_gradients_exact(kind, side):
    tensors, options = _case(kind, (side, side), (side, side), heads=1, dim=16, mean=5.0)
    # "elu" and "softmax" weigh 1,024 values so evenly that a token's mean is all but the next one's
    alike = ["out: shifted by one"] if side == 32 and kind in ("elu", "softmax") else []
    check_against_float64(linear_attention, tensors, alike=alike, units=False, **options)


def test_tokens_without_any_positive_number_have_the_reference_gradients():
    """All features are tiny there, so that the epsilon under the division counts."""
    tensors, options = _case(TEMPERATURE[0], (3, 4), (3, 4), heads=2, dim=8)
    with torch.no_grad():
        tensors["q"][:, :2].abs_().neg_()
        tensors["k"][0].abs_().neg_()
    check_against_float64(linear_attention, tensors, **options)


@pytest.mark.parametrize("kind", ["softmax", *TEMPERATURE])
def test_runs_repeat_bit_for_bit(kind):
    tensors, options = _case(kind, (6, 11), (6, 11), heads=2, dim=8)
    check_repeats(linear_attention, tensors, **options)


def test_takes_views_of_one_projection_and_other_strides():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 5, 6, 3, 2, 8, generator=generator).to(DEVICE).unbind(3)
    expected = linear_attention(q, k, v, feature_map="focused", backend="reference")
    views = [q, k.transpose(1, 2).contiguous().transpose(1, 2), v.transpose(3, 4).contiguous().transpose(3, 4)]
    out = linear_attention(*views, feature_map="focused", backend="triton")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("feature_map", MAPS)
def test_half_precision_is_finite_and_exact_at_large_sizes_and_activations(feature_map, dtype):
    """65,536 tokens on a GPU, with activations times ten."""
    side = 256 if DEVICE == "cuda" else 9
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        (torch.randn(1, side, side, 2, 8, generator=generator) * 10).to(DEVICE, dtype).requires_grad_()
        for _ in range(3)
    )
    out = linear_attention(q, k, v, feature_map=feature_map, backend="triton")
    exact = linear_attention(*(t.detach().double() for t in (q, k, v)), feature_map=feature_map)
    assert out.isfinite().all()
    assert (out.double() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()
    out.square().mean().mul(1000).backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in (q, k, v))


@pytest.mark.parametrize("width", [129, 256])
def test_too_wide_heads_are_refused_by_name_and_fall_back_else(width):
    q = torch.randn(1, 4, 4, 1, width, device=DEVICE)
    with pytest.raises(ValueError, match=f"cannot run: its kernels take head widths up to 128, got {width}"):
        linear_attention(q, q, q, backend="triton")
    torch.testing.assert_close(linear_attention(q, q, q), linear_attention(q, q, q, backend="reference"))
