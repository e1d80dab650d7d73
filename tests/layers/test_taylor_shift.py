"""Taylor-softmax attention against its definition token by token, and its two forms against each other."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from visionzoo.layers.mixers import TaylorShiftMixer

OPTIONS = [
    {},
    {"output_normalized": True},
    {"normalize_input": False, "output_normalized": True, "coefficients": (1.0, 0.5, 0.25), "qkv_bias": False},
]


def _mixer(**options):
    torch.manual_seed(0)
    mixer = TaylorShiftMixer(8, 2, **options).double()
    if mixer.temperature is not None:
        torch.nn.init.uniform_(mixer.temperature, 0.5, 2.0)
    return mixer, 5 * torch.randn(2, 3, 4, 8, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_weights_are_a_polynomial_of_the_scores(options):
    mixer, x = _mixer(**options)
    a, b, c = options.get("coefficients", (0.5, 1.0, 1.0))
    out = torch.zeros(2, 12, 2, 4, dtype=torch.float64)
    for sample in range(2):
        q, k, v = mixer.qkv(x[sample]).reshape(12, 3, 2, 4).permute(1, 2, 0, 3)
        for g in range(2):
            for i in range(12):
                if mixer.temperature is None:
                    scores = [float(q[g, i] @ k[g, j]) / math.sqrt(8) for j in range(12)]
                else:
                    scale = float(mixer.temperature[0, g] / q[g, i].norm())
                    scores = [scale * float(q[g, i] @ k[g, j] / k[g, j].norm()) for j in range(12)]
                weights = [a * s * s + b * s + c for s in scores]
                assert min(weights) >= 0
                out[sample, i, g] = sum(w * v[g, j] for j, w in enumerate(weights)) / sum(weights)
    if options.get("output_normalized"):
        out *= math.sqrt(12 / 4)
    torch.testing.assert_close(mixer(x).view(2, 12, 8), mixer.proj(out.flatten(2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_both_forms_are_equal_with_their_gradients(options):
    mixer, x = _mixer(**options)
    results = []
    for threshold in (0, 10**6):
        mixer.threshold = threshold
        mixer.zero_grad()
        given = x.clone().requires_grad_()
        out = mixer(given)
        (out**3).sum().backward()
        results.append([out.detach(), given.grad, *(p.grad for p in mixer.parameters())])
    assert not torch.equal(results[0][0], results[1][0])  # they are two forms
    for linear, direct in zip(*results, strict=True):
        assert (linear - direct).norm() <= 1e-12 * direct.norm()


def test_the_number_of_tokens_chooses_the_form():
    mixer = TaylorShiftMixer(8, 2)  # heads of 4: 21 features
    products = 2 * 8 * 4 * 8  # a token's layers
    for height, width, cost in ((3, 7, 2 * 2 * 21 * 2 * 4), (2, 11, 2 * 2 * 2 * 21 * 5)):
        with FlopCounterMode(display=False) as counter:
            mixer(torch.randn(1, height, width, 8))
        assert counter.get_total_flops() == height * width * (products + cost)
