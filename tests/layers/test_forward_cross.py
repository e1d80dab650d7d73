"""Forward cross attention against single tokens, and what its stages hand from block to block."""

import pytest
import timm
import torch
import torch.nn.functional as F

from visionzoo.layers.mixers import ForwardCrossMixer
from visionzoo.models._registry import TINY


@torch.no_grad()
def test_cross_tokens_are_keys_beside_those_of_the_map():
    torch.manual_seed(0)
    mixer = ForwardCrossMixer(8, 2, map_size=(3, 4), cross_tokens=3).double()
    for parameter in mixer.parameters():
        parameter.normal_()
    x, cross = torch.randn(1, 3, 4, 8, dtype=torch.float64), torch.randn(1, 3, 8, dtype=torch.float64)
    tokens = torch.cat([x.reshape(12, 8), mixer.cross_norm(cross * mixer.cross_scale)[0]])
    q, k, v = mixer.qkv(tokens).view(15, 3, 2, 4).unbind(1)
    out = torch.zeros(12, 2, 4, dtype=torch.float64)
    for head in range(2):
        for i in range(12):
            scores = []
            for j in range(15):
                dy, dx = abs(i // 4 - j // 4), abs(i % 4 - j % 4)
                bias = mixer.bias_table[head, 4 * dy + dx] if j < 12 else mixer.cross_bias[0, head, 0, j - 12]
                scores.append(q[i, head] @ k[j, head] / 2 + bias)
            out[i, head] = F.softmax(torch.stack(scores), 0) @ v[:, head]
    expected = mixer.proj(out.flatten(1)).view(1, 3, 4, 8)
    torch.testing.assert_close(mixer(x, cross), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("given", "count"), [(None, 0), (torch.zeros(1, 2, 8), 2)])
def test_another_number_of_cross_tokens_is_refused(given, count):
    with pytest.raises(ValueError, match=f"expected 3 cross tokens, got {count}"):
        ForwardCrossMixer(8, 2, cross_tokens=3)(torch.zeros(1, 3, 4, 8), given)


def _model(**kwargs):
    return timm.create_model("zoo_fcaformer_l1", num_classes=3, **{**TINY["zoo_fcaformer_l1"], **kwargs})


@pytest.mark.parametrize(("most", "sources"), [(12, [0, 1, 2, 3]), (2, [0, 1, 2, 2]), (0, [0, 0, 0, 0])])
def test_blocks_see_the_latest_blocks_before_them(most, sources):
    stage = _model(depths=(1, 1, 4, 1), max_sources=most, device="meta").stages[2]
    assert stage.sources == sources
    assert [block.merge is not None for block in stage.blocks] == [most > 0] * 3 + [False]


@torch.no_grad()
def test_windows_of_a_large_map_are_maps_of_their_own():
    """At twice the size a stage of one block computes each window by itself, filled up at its first row and column."""
    stage = _model(depths=(1, 1, 1, 1)).eval().stages[2]
    x = torch.randn(1, 16, 14, 14)  # a map of 7 x 7: one row and column of zeros make windows of 4 x 4
    filled = F.pad(stage.downsample(x.permute(0, 2, 3, 1)), (0, 0, 1, 0, 1, 0))
    assert filled.shape[1:3] == (8, 8)
    out = torch.zeros(1, 8, 8, 16)
    for row in (0, 4):
        for column in (0, 4):
            window = filled[:, row : row + 4, column : column + 4].contiguous()
            out[:, row : row + 4, column : column + 4] = stage.blocks[0](window)[0]
    torch.testing.assert_close(stage(x), out[:, 1:, 1:].permute(0, 3, 1, 2))


def test_other_mixers_have_neither_cross_tokens_nor_windows():
    stages = _model(mixers=(None, None, "pool", None)).stages
    assert stages[2].window is None and all(block.merge is None for block in stages[2].blocks)
    assert stages[3].window == (2, 2) and stages[3].sources == [0, 1]


def test_a_negative_number_of_sources_is_refused():
    with pytest.raises(ValueError, match="max_sources must not be negative, got max_sources=-1"):
        _model(max_sources=-1)
