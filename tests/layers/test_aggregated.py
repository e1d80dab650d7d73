"""Aggregated attention and its routed heads, by the definition in loops, where the authors' records do not reach."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error

from visionzoo.layers.mixers import AggregatedMixer, MixtureOfHeadsMixer
from visionzoo.layers.mixers.mixture_of_heads import HeadRouter
from visionzoo.layers.outputs import collect
from visionzoo.layers.pooling import pool_cells


def _drawn(mixer):
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer.double().eval()


def _in_loops(mixer, x, cells):
    """One sample [H, W, C], token by token and head by head, before the last projection."""
    height, width, _ = x.shape
    groups, reach = mixer.num_heads, mixer.window_size // 2
    unit = mixer.map_size or (height, width)
    q = mixer.q(x).unflatten(-1, (groups, -1))
    k, v = mixer.kv(x).unflatten(-1, (2, groups, -1)).unbind(2)
    features = F.gelu(mixer.sr(x.permute(2, 0, 1)[None]))
    pooled = mixer.norm(F.adaptive_avg_pool2d(features, cells)[0].permute(1, 2, 0))
    pooled_k, pooled_v = mixer.kv(pooled).unflatten(-1, (2, groups, -1)).unbind(2)
    centres = [F.adaptive_avg_pool1d(torch.arange(side).double()[None], count)[0] for side, count in
               zip((height, width), cells, strict=True)]  # fmt: skip
    out = torch.zeros(height, width, groups, mixer.head_dim, dtype=x.dtype)
    for y in range(height):
        for x_ in range(width):
            window = [(i, y + i // (2 * reach + 1) - reach, x_ + i % (2 * reach + 1) - reach)
                      for i in range((2 * reach + 1) ** 2)]  # fmt: skip
            window = [(i, a, b) for i, a, b in window if 0 <= a < height and 0 <= b < width]
            count = len(window) + cells[0] * cells[1]
            for g in range(groups):
                unit_q = F.normalize(q[y, x_, g], dim=0)
                query = (unit_q + mixer.query_embedding[g]) * F.softplus(mixer.temperature[g]) * math.log(count)
                scores = [query @ F.normalize(k[a, b, g], dim=0) + mixer.window_bias[g, i] for i, a, b in window]
                values = [v[a, b, g] for _, a, b in window]
                for a in range(cells[0]):
                    for b in range(cells[1]):
                        offsets = torch.stack([(y - centres[0][a]) / max(unit[0] - 1, 1) * 8,
                                               (x_ - centres[1][b]) / max(unit[1] - 1, 1) * 8])  # fmt: skip
                        seen = offsets.sign() * torch.log2(offsets.abs() + 1) / 3
                        bias = mixer.position_bias.fc2(F.relu(mixer.position_bias.fc1(seen)))[g]
                        scores.append(query @ F.normalize(pooled_k[a, b, g], dim=0) + bias)
                        values.append(pooled_v[a, b, g])
                weights = torch.stack(scores).softmax(0)
                for n, (i, _, _) in enumerate(window):
                    weights[n] += unit_q @ mixer.window_tokens[g, :, i] + mixer.window_offset[g, i]
                out[y, x_, g] = sum(w * value for w, value in zip(weights, values, strict=True))
    return out


@pytest.mark.parametrize(
    ("size", "cells", "options"),
    [
        ((4, 6), (2, 3), {"reduction": 2}),
        ((5, 3), (2, 1), {"reduction": 2, "window_size": 5}),  # cells overlap, and the window leaves the map
        ((1, 7), (1, 3), {"pool_size": 3, "map_size": (4, 9)}),
    ],
)
@torch.no_grad()
def test_attention_is_that_of_the_definition(size, cells, options):
    mixer = _drawn(AggregatedMixer(8, 2, **options))
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    expected = mixer.proj(_in_loops(mixer, x[0], cells).flatten(2))
    assert relative_error(mixer(x)[0], expected) < 1e-6  # offsets and logarithms are float32, as released


@torch.no_grad()
def test_biases_go_on_beyond_the_map_of_training_or_stretch_with_it():
    for own, same in [((4, 4), True), (None, False)]:
        bias = _drawn(AggregatedMixer(8, 2, reduction=2, map_size=own))._bias
        small, large = (bias(torch.empty(1, n, n, 8, dtype=torch.float64), (n // 2, n // 2)) for n in (4, 8))
        small, large = (b.unflatten(2, (n // 2, n // 2)).unflatten(1, (n, n)) for b, n in ((small, 4), (large, 8)))
        assert torch.equal(small, large[:, :4, :4, :2, :2]) == same


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (7, 2)])
def test_cells_are_those_of_adaptive_pooling(size):
    x = torch.randn(2, 7, 5, 3, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    torch.testing.assert_close(pool_cells(x, size), expected, rtol=1e-12, atol=1e-12)


# -- heads as experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "routed"), [(0, 2), (1, 2), (2, 3), (5, 0)])
@torch.no_grad()
def test_gates_are_those_of_the_definition(shared, routed):
    router = _drawn(HeadRouter(8, 5, shared, routed))
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    gates = router(x)
    for y in range(2):
        for x_ in range(3):
            token = x[0, y, x_]
            first = (router.shared.weight @ token).softmax(0) * shared if shared > 1 else torch.ones(shared).double()
            rest = torch.zeros(5 - shared).double()
            if routed:
                chances = (router.routed.weight @ token).softmax(0)
                best = sorted(range(5 - shared), key=lambda i: -chances[i])[:routed]
                for i in best:
                    rest[i] = chances[i] / sum(chances[j] for j in best) * routed
            if shared and routed:
                kinds = (router.kinds.weight @ token).softmax(0) * 2
                first, rest = first * kinds[0], rest * kinds[1]
            torch.testing.assert_close(gates[0, y, x_], torch.cat([first, rest]))


def test_heads_are_multiplied_by_their_gates():
    mixer = _drawn(MixtureOfHeadsMixer(8, 4, reduction=2, shared_heads=1, routed_heads=1))
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    plain = AggregatedMixer(8, 4, reduction=2).double()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("router.")})
    plain.weigh_heads = lambda heads, x: heads * mixer.router(x)[..., None]
    assert ((gates := mixer.router(x)) > 0).sum(-1).eq(2).all() and gates.std() > 0.1
    torch.testing.assert_close(mixer(x), plain(x), rtol=1e-12, atol=1e-12)


def test_terms_are_the_authors_loss_and_the_load_of_the_busiest_head():
    router = _drawn(HeadRouter(8, 5, 1, 2)).train()
    router.num_layers = 2
    x = torch.randn(2, 3, 3, 8, dtype=torch.float64)
    with collect() as terms:
        taken = router(x)[..., 1:] > 0
    load = taken.double().mean((0, 1, 2))
    chances = router.routed(x).softmax(-1).mean((0, 1, 2))
    assert terms["balance"].item() == pytest.approx(((load * chances).mean() * 16 / 2).item())
    assert terms["busiest_head"].item() == pytest.approx((load.max() / 2).item())
    terms["balance"].backward()
    assert router.routed.weight.grad.norm() > 0
    with collect() as terms:
        router.eval()(x)
        HeadRouter(8, 5, 5, 0)(x.float())
    assert terms == {}
