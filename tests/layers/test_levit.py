"""LeViT's attention is what its formula says, on any map."""

import math

import pytest
import torch
from quick import draw_weights
from torch import nn

from visionzoo.layers.mixers.levit import LevitMixer
from visionzoo.layers.mixers.offset_bias import offset_index


def _mixer(**options):
    """A mixer with weights and statistics that are nowhere 0 or 1."""
    torch.manual_seed(0)
    mixer = draw_weights(LevitMixer(12, 3, key_dim=4, **options)).double().eval()
    nn.init.normal_(mixer.bias_table, std=2.0)
    for norm in mixer.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return mixer


def _linear_norm(pair, token):
    """Linear layer and batch norm of one token, written out."""
    y = pair.linear.weight @ token
    norm = pair.norm
    return (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias


def _naive(mixer, x):
    """One sample [H, W, C], one query, head and key at a time; the bias table is for this very map."""
    height, width, _ = x.shape
    table = mixer.bias_table.view(mixer.num_heads, height, width)
    key_dim, stride = mixer.key_dim, mixer.stride
    places = [(row, column) for row in range(height) for column in range(width)]
    keys, values, queries = {}, {}, {}
    for place in places:
        if stride == 1:
            heads = _linear_norm(mixer.qkv, x[place]).view(mixer.num_heads, -1)
            queries[place], heads = heads[:, :key_dim], heads[:, key_dim:]
        else:
            heads = _linear_norm(mixer.kv, x[place]).view(mixer.num_heads, -1)
            queries[place] = _linear_norm(mixer.q, x[place]).view(mixer.num_heads, -1)
        keys[place], values[place] = heads[:, :key_dim], heads[:, key_dim:]
    out = torch.empty(math.ceil(height / stride), math.ceil(width / stride), mixer.out_dim, dtype=x.dtype)
    for row, column in places:
        if row % stride or column % stride:
            continue
        attended = []
        for head in range(mixer.num_heads):
            scores = torch.stack([
                queries[row, column][head] @ keys[r, c][head] / math.sqrt(key_dim)
                + table[head, abs(r - row), abs(c - column)]
                for r, c in places
            ])  # fmt: skip
            weights = scores.exp() / scores.exp().sum()
            attended.append(sum(w * values[place][head] for w, place in zip(weights, places, strict=True)))
        hidden = torch.cat(attended)
        hidden = hidden * (hidden + 3).clamp(0, 6) / 6
        out[row // stride, column // stride] = _linear_norm(mixer.proj, hidden)
    return out


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "out_dim": 20, "attn_ratio": 4}, {"stride": 3}, {"attn_ratio": 0.5}]
)
@pytest.mark.parametrize("size", [(4, 5), (5, 3)])
@torch.no_grad()
def test_attention_is_its_formula(options, size):
    mixer = _mixer(map_size=size, **options)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    expected = torch.stack([_naive(mixer, sample) for sample in x])
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


def _bias(table, size, stride=1):
    """[G, query y, query x, key y, key x] of a mixer with this table."""
    mixer = LevitMixer(12, len(table), key_dim=4, map_size=table.shape[1:], stride=stride)
    mixer.bias_table = nn.Parameter(table.flatten(1))
    bias = mixer.offset_bias(size, table.dtype).detach()
    return bias.reshape(len(table), *(-(-n // stride) for n in size), *size)


def test_bias_of_the_trained_size_is_the_table_itself():
    table = torch.randn(2, 5, 4)
    bias = _bias(table, (5, 4))
    assert torch.equal(bias[:, 0, 0], table)
    assert torch.equal(bias[:, 3, 1, 1, 3], table[:, 2, 2])
    assert torch.equal(_bias(table, (5, 4), stride=2), bias[:, ::2, ::2])


def test_offsets_are_counted_row_by_row():
    assert offset_index((1, 3)).tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    assert offset_index((2, 2), stride=2).tolist() == [[0, 1, 2, 3]]


@torch.no_grad()
def test_precomputed_biases_are_those_of_the_table_and_other_maps_look_theirs_up():
    mixer = _mixer(map_size=4, stride=2)
    images = [torch.randn(1, *size, 12, dtype=torch.float64) for size in ((4, 4), (5, 3))]
    expected = [mixer(x) for x in images]
    mixer.precompute()
    assert all(torch.equal(mixer(x), out) for x, out in zip(images, expected, strict=True))
    mixer.bias_table.zero_()
    assert torch.equal(mixer(images[0]), expected[0]) and not torch.equal(mixer(images[1]), expected[1])


@pytest.mark.parametrize("size", [(9, 7), (3, 3), (1, 1), (2, 13), (5, 4)])
def test_resized_bias_is_linear_between_the_table_s_offsets(size):
    table = torch.randn(2, 5, 4, dtype=torch.float64)
    bias = _bias(table, size)
    for dy in range(size[0]):
        for dx in range(size[1]):
            # the largest offset of the map is the table's largest
            y, x = (d * (full - 1) / max(n - 1, 1) for d, full, n in ((dy, 5, size[0]), (dx, 4, size[1])))
            top, left = min(int(y), 3), min(int(x), 2)
            fy, fx = y - top, x - left
            expected = (
                (1 - fy) * (1 - fx) * table[:, top, left]
                + (1 - fy) * fx * table[:, top, left + 1]
                + fy * (1 - fx) * table[:, top + 1, left]
                + fy * fx * table[:, top + 1, left + 1]
            )
            torch.testing.assert_close(bias[:, 0, 0, dy, dx], expected)
            torch.testing.assert_close(bias[:, dy, dx, 0, 0], expected)


@pytest.mark.parametrize("size", [(4, 4), (6, 3)])
def test_gradients_are_right_for_table_and_input(size):
    mixer = _mixer(map_size=4, stride=2)
    x = torch.randn(1, *size, 12, dtype=torch.float64, requires_grad=True)

    def output(x, table):
        return torch.func.functional_call(mixer, {"bias_table": table}, x)

    assert torch.autograd.gradcheck(output, (x, mixer.bias_table.detach().requires_grad_()))


@torch.no_grad()
def test_no_bias_outlives_a_forward():
    """timm and the authors keep the gathered biases in eval mode and do not see later changes."""
    mixer = _mixer(map_size=4)
    x = torch.randn(1, 4, 4, 12, dtype=torch.float64)
    before = mixer(x)
    mixer.bias_table.normal_(std=2.0)
    changed = mixer(x)
    assert not torch.allclose(before, changed)
    mixer.load_state_dict({**mixer.state_dict(), "bias_table": torch.zeros(3, 16)})
    assert not torch.allclose(changed, mixer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_low_precision_is_close_also_where_the_table_is_resized(dtype):
    mixer = _mixer(map_size=4)
    x = torch.randn(1, 6, 5, 12, dtype=torch.float64)
    expected = mixer(x)
    out = mixer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= 20 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_one_compilation_serves_all_sizes(stride):
    mixer = _mixer(map_size=4, stride=stride)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend=backend)
    for size in ((5, 6), (4, 4), (8, 7), (4, 7), (12, 4)):
        x = torch.randn(2, *size, 12, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), mixer(x), rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="key_dim=0"):
        LevitMixer(12, 3, key_dim=0)
    with pytest.raises(ValueError, match="map_size=0"):
        LevitMixer(12, 3, map_size=0)
    with pytest.raises(ValueError, match="num_heads=0"):
        LevitMixer(12, 0)
    assert LevitMixer(12, 5)(torch.randn(2, 3, 3, 12)).shape == (2, 3, 3, 12)  # heads need not divide


def test_attention_on_the_cpu_does_not_look_for_rows_that_see_nothing():
    """What torch's own function does on a CPU where values have their own width took a tenth of LeViT-128S's time."""
    mixer = LevitMixer(32, 2, map_size=4).eval()
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mixer(torch.randn(1, 4, 4, 32))
    called = {event.key for event in profile.key_averages()}
    assert "aten::_softmax" in called and not called & {"aten::_safe_softmax", "aten::isneginf"}
