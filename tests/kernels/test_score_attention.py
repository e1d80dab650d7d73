"""Score attention against loops over single queries and keys, in float64."""

import math

import pytest
import torch

from visionzoo.kernels import score_attention

FUNCTIONS = {  # of the scores of one query, numbers
    "sigmoid": lambda scores: [1 / (1 + len(scores) * math.exp(-s)) for s in scores],
    "relu": lambda scores: [max(s, 0.0) for s in scores],
    "signed_softmax": lambda scores: [
        math.copysign(math.exp(abs(s)), s) / sum(math.exp(abs(t)) for t in scores) for s in scores
    ],
    "softplus": lambda scores: [math.log1p(math.exp(s)) / sum(math.log1p(math.exp(t)) for t in scores) for s in scores],
    "taylor": lambda scores: [(1 + s + s * s / 2) / sum(1 + t + t * t / 2 for t in scores) for s in scores],
}


def _inputs(dtype=torch.float64, size=(2, 3), key_size=(1, 5)):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, *s, 2, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in (size, key_size, key_size)
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_are_those_of_loops(name):
    q, k, v = _inputs()
    out = score_attention(q, k, v, normalizer=name, scale=0.7)
    expected = torch.zeros_like(out)
    for b, y, x, g in torch.cartesian_prod(*map(torch.arange, q.shape[:4])).tolist():
        keys, values = k[b, :, :, g].flatten(0, 1), v[b, :, :, g].flatten(0, 1)
        scores = [0.7 * sum(p * r for p, r in zip(q[b, y, x, g].tolist(), key, strict=True)) for key in keys.tolist()]
        weights = torch.tensor(FUNCTIONS[name](scores), dtype=torch.float64)
        expected[b, y, x, g] = (weights[:, None] * values).sum(0)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(name):
    inputs = [t[:1, :, :, :1] for t in _inputs(size=(1, 2), key_size=(1, 3))]
    assert torch.autograd.gradcheck(lambda *qkv: score_attention(*qkv, normalizer=name), inputs)


def test_the_output_has_the_dtype_that_is_asked_for():
    q, k, v = _inputs(torch.float16)
    assert score_attention(q, k, v, normalizer="relu").dtype == torch.float16
    large = score_attention(q * 1e3, k, v * 1e3, normalizer="relu", dtype=torch.float32)
    assert large.dtype == torch.float32 and large.isfinite().all() and large.abs().max() > 65504


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": "softmax"}, "unknown normalizer='softmax', expected one of"),
        ({"dtype": torch.int32}, "dtype must be floating point or None, got torch.int32"),
        ({"backend": "triton"}, "cannot run"),
        ({"v": torch.zeros(2, 1, 5, 2, 3, dtype=torch.float64)}, r"with the same B, G and D"),
        ({"v": torch.zeros(2, 5, 1, 2, 4, dtype=torch.float64)}, r"v must be like k \(2, 1, 5, 2, 4\), got"),
        ({"k": torch.zeros(2, 1, 5, 2, 4)}, "share a floating dtype"),
    ],
)
def test_bad_arguments_are_refused_with_their_values(change, message):
    inputs = dict(zip("qkv", _inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        score_attention(**{**inputs, "normalizer": "sigmoid", **change})
