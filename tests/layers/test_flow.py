"""Flow attention against the flows of single tokens, summed one by one."""

import math

import pytest
import torch

from visionzoo.layers.mixers import FlowMixer

EPS = 1e-6


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _flow(at, others, eps):
    """The flow between one token's features and those of others: an epsilon at each of two places, or three."""
    return sum((a + EPS) * (sum(column) + EPS) for a, column in zip(at, zip(*others, strict=True), strict=True)) + eps


@pytest.mark.parametrize("options", [{}, {"eps_of_flows": False}])
@torch.no_grad()
def test_it_is_attention_by_flows_that_are_conserved(options):
    torch.manual_seed(0)
    eps = 0.0 if options else EPS
    mixer = FlowMixer(8, 2, **options).double()
    x = 3 * torch.randn(1, 3, 4, 8, dtype=torch.float64)
    q, k, v = (t.tolist() for t in mixer.qkv(x).reshape(12, 3, 2, 4).permute(1, 2, 0, 3))  # [G, N, D] each
    out, conserved = torch.zeros(12, 2, 4, dtype=torch.float64), []
    for g in range(2):
        queries, keys = ([[_sigmoid(a) for a in token] for token in tokens[g]] for tokens in (q, k))
        incoming = [_flow(token, keys, eps) for token in queries]
        outgoing = [_flow(token, queries, eps) for token in keys]
        held = [[a / flow for a in token] for token, flow in zip(keys, outgoing, strict=True)]
        allocation = [_sigmoid(_flow(token, held, eps)) for token in queries]
        held = [[a / flow for a in token] for token, flow in zip(queries, incoming, strict=True)]
        conserved += [_flow(token, held, eps) for token in keys]
        weights = [math.exp(min(max(flow, -1), 1)) for flow in conserved[-12:]]
        for i in range(12):
            for j in range(12):
                reach = sum(a * b for a, b in zip(queries[i], keys[j], strict=True)) / incoming[i] * allocation[i]
                out[i, g] += reach * 12 * weights[j] / sum(weights) * torch.tensor(v[g][j], dtype=torch.float64)
    assert 0 < sum(flow > 1 for flow in conserved) < 24  # the clamp bites, and not everywhere
    torch.testing.assert_close(mixer(x).view(12, 8), mixer.proj(out.flatten(1)), rtol=1e-12, atol=1e-12)
