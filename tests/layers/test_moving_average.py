"""Moving averages and the biases of distances are their definitions, in loops; any map."""

from math import erf, exp, sqrt

import pytest
import torch
import torch.nn.functional as F

from visionzoo.layers.mixers import MovingAverageMixer
from visionzoo.layers.mixers.moving_average import MovingAverage, SequenceBias


@torch.no_grad()
def test_averages_decay_in_both_directions():
    torch.manual_seed(0)
    dim, count, averages = 3, 7, 2
    layer = MovingAverage(dim, averages).double()
    x = torch.randn(2, count, dim, dtype=torch.float64)
    y = x * layer.omega
    for c in range(2 * dim):
        for n in range(averages):
            alpha, delta = layer.alpha[c, n].sigmoid(), layer.delta[c, n].sigmoid()
            weight = alpha * layer.beta[c, n] * layer.gamma[c, n] / sqrt(averages)
            for t in range(count):
                for s in range(count):
                    steps = t - s if c < dim else s - t - 1
                    if steps >= 0:
                        y[:, t, c % dim] += weight * (1 - alpha * delta) ** steps * x[:, s, c % dim]
    torch.testing.assert_close(layer(x), F.silu(y))


@torch.no_grad()
def test_biases_are_those_of_distances_in_the_sequence_and_of_offsets_on_other_maps():
    bias = SequenceBias((3, 4)).double()
    own = bias((3, 4))
    for i in range(12):
        for j in range(12):
            assert own[i, j] == bias.table[11 + j - i]
    other = bias((5, 7)).view(5, 7, 5, 7)
    corners = other[::4, ::6, ::4, ::6]
    torch.testing.assert_close(corners, own.view(3, 4, 3, 4)[::2, ::3, ::2, ::3])
    assert (other[0, 0, 1, 1] - other[1, 2, 2, 3]).abs() < 1e-12  # offsets alone matter
    assert torch.equal(SequenceBias((3, 3)).fit_weight("table", torch.arange(17.0)), torch.arange(17.0))
    larger = SequenceBias((5, 5)).fit_weight("table", torch.arange(17.0))
    assert larger.shape == (49,) and larger[[0, 24, 48]].tolist() == [0, 8, 16] and (larger[:25].diff() >= 0).sum() > 12
    with pytest.raises(ValueError, match=r"table: expected the distances on a square map, got \(16,\)"):
        bias.fit_weight("table", torch.zeros(16))


@pytest.mark.parametrize("attention", MovingAverageMixer.ATTENTION)
@torch.no_grad()
def test_every_pair_of_tokens_has_a_weight_of_its_score(attention):
    torch.manual_seed(0)
    mixer = MovingAverageMixer(
        4, value_ratio=1.5, qk_dim=3, num_averages=2, attention=attention, map_size=(2, 3)
    ).double()
    torch.nn.init.normal_(mixer.gamma)
    torch.nn.init.normal_(mixer.beta)
    q, k, v = (torch.randn(1, 6, width, dtype=torch.float64) for width in (3, 3, 6))
    weights = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            score = float(q[0, i] @ k[0, j]) / (sqrt(3) if attention == "softmax" else 6) + float(
                mixer.bias.table[5 + j - i]
            )
            weights[i, j] = {
                "laplace": 0.5 * (1 + erf((score - 0.707107) / (0.282095 * sqrt(2)))),
                "relu2": max(score, 0) ** 2,
                "softmax": exp(score),
            }[attention]
    if attention == "softmax":
        weights /= weights.sum(1, keepdim=True)
    torch.testing.assert_close(mixer._attend(q, k, v, torch.Size((2, 3)))[0], weights @ v[0])


@torch.no_grad()
def test_the_gate_replaces_what_came_before_the_norm():
    mixer = MovingAverageMixer(4, qk_dim=3, num_averages=2, map_size=2)
    x, unnormed = torch.randn(2, 1, 2, 3, 4)
    torch.testing.assert_close(mixer(x, x), mixer(x))
    gate = mixer.mx_proj(mixer.average(x.flatten(1, 2)))[..., :4].sigmoid().unflatten(1, (2, 3))
    torch.testing.assert_close(mixer(x, unnormed) - mixer(x, x), gate * (x - unnormed))
