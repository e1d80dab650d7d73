"""Attention fades out by epochs, and is gone at the end without a trace in the logits."""

import copy

import pytest
import timm
import torch
from quick import draw_weights, quick_model
from torch import nn

import visionzoo
from visionzoo.engine.calling import set_epoch

SMALL = {"depth": 4, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
IMAGE = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def _shares(model):
    return [float(getattr(block, "share", 1)) for block in model.blocks]


def test_the_share_falls_with_the_epochs_in_every_copy():
    model = timm.create_model("zoo_lambda_vit_t_024", removed=(0,), fading=(1, 3), fading_epochs=4, **SMALL)
    averaged = nn.Sequential(copy.deepcopy(model))
    for epoch, share in enumerate((1, 0.75, 0.5, 0.25, 0, 0)):
        for module in (nn.Sequential(model), averaged, None):
            set_epoch(module, epoch)
        assert _shares(model) == _shares(averaged[0]) == [1, share, 1, share]
    assert not [name for name in model.state_dict() if "share" in name]


@torch.no_grad()
def test_faded_attention_can_be_left_out():
    faded = quick_model("zoo_lambda_vit_t_024", removed=(0,), fading=(1, 3), **SMALL)
    before = faded(IMAGE)
    faded.set_epoch(299)
    model = quick_model("zoo_lambda_vit_t_024", removed=(0, 1, 3), **SMALL)
    report = visionzoo.load_weights(model, faded.state_dict())
    assert len(report.dropped) == 2 * 6 and not report.missing
    torch.testing.assert_close(model(IMAGE), faded(IMAGE))
    assert (before - model(IMAGE)).norm() > 1e-2 * before.norm()
    names = {name for name, _ in model.named_parameters()}
    assert "blocks.2.mixer.qkv.weight" in names and not [
        n for n in names if n.startswith(("blocks.1.mixer", "blocks.3.norm1"))
    ]


@torch.no_grad()
def test_a_block_without_attention_doubles_its_tokens_and_others_mixers_take_their_place():
    model = quick_model("zoo_lambda_vit_t_024", removed=(0,), **SMALL)
    tokens = model.begin(IMAGE)
    block = model.blocks[0]
    expected = 2 * tokens.x + block.mlp(block.norm2(2 * tokens.x))
    torch.testing.assert_close(block(tokens).x, expected)
    model = draw_weights(timm.create_model("zoo_lambda_vit_t_024", removed=(0,), mixers="linear", **SMALL)).eval()
    tokens, block = model.begin(IMAGE), model.blocks[0]
    x = tokens.x + block.mixer(block.norm1(tokens.x).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(block(tokens).x, x + block.mlp(block.norm2(x)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"removed": (4,)}, r"numbers of the 4 blocks, .*got removed=\(4,\) and fading=\(\)"),
        ({"removed": (1,), "fading": (1, 2)}, r"none of them both removed and fading, .*fading=\(1, 2\)"),
        ({"removed": (0, 1, 2, 3)}, r"one at least with attention, got removed=\(0, 1, 2, 3\)"),
        ({"removed": (), "fading": (-1,)}, r"got removed=\(\) and fading=\(-1,\)"),
        ({"fading_epochs": 0}, r"fading_epochs must be positive, got fading_epochs=0"),
    ],
)
def test_what_cannot_be_removed_is_said(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("zoo_lambda_vit_t_024", **{"removed": (0,), **kwargs}, **SMALL)
