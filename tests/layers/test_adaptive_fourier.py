"""Adaptive filters, and the block around them, are the authors'."""

import pytest
import torch
from golden import Record, relative_error, sample
from torch import nn

from visionzoo.layers.mixers import AdaptiveFourierMixer
from visionzoo.layers.nhwc import GroupNorm1
from visionzoo.models.affnet import FrequencyBlock


@pytest.mark.parametrize("name", ["aff_filter_swish", "aff_block_swish"])
@torch.no_grad()
def test_filter_and_block_are_the_authors(name):
    record = Record(f"affnet/{name}")
    layer = AdaptiveFourierMixer(64, num_blocks=8, threshold=0.01)
    if "block" in name:
        layer = FrequencyBlock(64, layer, mlp_ratio=2, norm_layer=GroupNorm1, act_layer=nn.SiLU)
    parts = {"filter.": "mixer.", ".block.exp_1x1.": ".expand.", ".block.conv_3x3.": ".depthwise."}
    state = {}
    for key, value in record.state_dict().items():
        for theirs, ours in (parts | {".block.red_1x1.": ".reduce.", "block.": ""}).items():
            key = key.replace(theirs, ours)
        state[key] = value
    layer.double().load_state_dict(state)
    image = record.image()
    out = layer.eval()(image.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    found = {"out": out, "change": out - image}
    for key, expected in record.arrays.items():
        value = found[key] if expected.shape == out.shape else sample(found[key], expected.size)
        assert relative_error(value, expected) <= 1e-9, key


def test_without_an_mlp_that_passes_the_threshold_the_map_stays():
    mixer = AdaptiveFourierMixer(8, threshold=0.5)
    x = torch.randn(1, 5, 7, 8)
    assert torch.equal(mixer(x), x)
    mixer.threshold = 0.0
    assert not torch.allclose(mixer(x), x)


@pytest.mark.parametrize(("dim", "blocks"), [(16, 8), (12, 6), (7, 7), (11, 1), (104, 8)])
def test_channels_are_cut_into_as_many_blocks_as_divide_them_up_to_eight(dim, blocks):
    mixer = AdaptiveFourierMixer(dim)
    assert mixer.w1.shape == (2, blocks, dim // blocks, dim // blocks)
    assert sum(p.numel() for p in mixer.parameters()) == 4 * dim * (dim // blocks + 1)


def test_autocast_leaves_the_transform_and_its_mlp_in_float32():
    mixer, x = AdaptiveFourierMixer(16), torch.randn(1, 5, 7, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixer(x), mixer(x.clone()))
        out = mixer(x)
    assert torch.equal(out, mixer(x))
