"""Channel attention as restoration networks have it, against its definition in loops."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from visionzoo.layers.mixers import ChannelMixer

FORMS = {
    "softmax": {"qkv_kernel": 3, "qk_norm": "l2"},
    "topk_softmax": {"qkv_kernel": 3, "qk_norm": "l2", "qkv_bias": False, "proj_bias": False},
    "relu": {"qk_norm": "l2"},
    "sigmoid": {"qkv_kernel": 5},
}


def _mixer(form, dim=12, heads=2):
    torch.manual_seed(0)
    mixer = ChannelMixer(dim, heads, normalizer=form, **FORMS[form]).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer


def _weights(form, row, factors):
    """Weights of the scores of one channel, a list of numbers."""
    order = sorted(row, reverse=True)
    if form == "relu":
        return [max(s, 0.0) for s in row]
    if form == "sigmoid":
        return [1 / (1 + len(row) * math.exp(-s)) for s in row]
    counts = [len(row)] if form == "softmax" else [int(len(row) * a / b) for a, b in ((1, 2), (2, 3), (3, 4), (4, 5))]
    out = [0.0] * len(row)
    for count, factor in zip(counts, [1.0] if form == "softmax" else factors, strict=True):
        kept = [math.exp(s) if s >= order[count - 1] else 0.0 for s in row]
        out = [o + factor * e / sum(kept) for o, e in zip(out, kept, strict=True)]
    return out


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_channels_attend_by_definition(form):
    mixer, width = _mixer(form), 6
    x = torch.randn(1, 3, 5, 12, dtype=torch.float64)
    state, bias = mixer.state_dict(), torch.zeros(36, dtype=torch.float64)
    qkv = x[0] @ state["qkv.weight"].T + state.get("qkv.bias", bias)
    if mixer.qkv_conv is not None:
        kernel, mixed = state["qkv_conv.weight"][:, 0], torch.zeros_like(qkv)
        reach = kernel.shape[1] // 2
        for y, z in ((y, z) for y in range(3) for z in range(5)):
            mixed[y, z] = state.get("qkv_conv.bias", bias)
            for dy, dz in ((a, b) for a in range(-reach, reach + 1) for b in range(-reach, reach + 1)):
                if 0 <= y + dy < 3 and 0 <= z + dz < 5:
                    mixed[y, z] += kernel[:, reach + dy, reach + dz] * qkv[y + dy, z + dz]
        qkv = mixed
    values, queries, keys = qkv.view(15, 3, 2, width).unbind(1)
    out = torch.zeros(15, 2, width, dtype=torch.float64)
    for head in range(2):
        for i in range(width):
            row = []
            for j in range(width):
                a, b = queries[:, head, i], keys[:, head, j]
                cosine = float((a * b).sum() / (a.norm() * b.norm()))
                dot = float((a * b).sum()) / math.sqrt(width)
                row.append(dot if mixer.temperature is None else float(mixer.temperature[head]) * cosine)
            weights = _weights(form, row, state.get("normalizer.factors", bias).tolist())
            out[:, head, i] = sum(w * values[:, head, j] for j, w in enumerate(weights))
    expected = out.flatten(1) @ state["proj.weight"].T + state.get("proj.bias", bias[:12])
    torch.testing.assert_close(mixer(x)[0].flatten(0, 1), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_differences(form):
    mixer = _mixer(form, dim=8)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def of(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), x)

    gradcheck(of, (x, *values), fast_mode=True)


@pytest.mark.parametrize(
    "form", ["topk_softmax", *(pytest.param(form, marks=pytest.mark.full) for form in ("softmax", "relu", "sigmoid"))]
)
@torch.no_grad()
def test_65536_large_tokens_in_half_precision_stay_finite(form):
    mixer = ChannelMixer(4, 1, normalizer=form, **FORMS[form]).half()
    out = mixer((torch.randn(1, 256, 256, 4) * 10).half())
    assert out.isfinite().all() and out.std() > 0


@torch.no_grad()
def test_dropped_tokens_leave_no_trace_and_a_convolution_takes_none():
    mixer = _mixer("relu")
    x, keep = torch.randn(1, 1, 6, 12, dtype=torch.float64), torch.tensor([[True, False, True, True, False, True]])
    torch.testing.assert_close(mixer(x, keep=keep)[:, :, keep[0]], mixer(x[:, :, keep[0]]))
    assert mixer.takes_dropped_tokens and mixer.takes_prefix_tokens
    convolved = _mixer("softmax")
    assert not convolved.takes_dropped_tokens and not convolved.takes_prefix_tokens
