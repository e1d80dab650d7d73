"""AFFNet's options."""

import pytest
import timm
import torch
from torch import nn

from visionzoo.layers.nhwc import GroupNorm1
from visionzoo.layers.norm import DeviationNorm
from visionzoo.models._registry import TINY

SMALL = TINY["zoo_affnet_et"]


@pytest.mark.parametrize(
    ("norm_layer", "act_layer", "kinds"),
    [
        ("layer_norm_2d", "gelu", (GroupNorm1, nn.GELU)),
        ("layer_norm", "hard_swish", (DeviationNorm, nn.Hardswish)),
        ("batch_norm", "relu6", (nn.BatchNorm2d, nn.ReLU6)),
    ],
)
def test_norms_and_activations_go_everywhere_and_train(norm_layer, act_layer, kinds):
    model = timm.create_model("zoo_affnet_et", norm_layer=norm_layer, act_layer=act_layer, double_skip=True, **SMALL)
    block = model.stages[2].blocks[0]
    assert {type(norm) for norm in (block.norm1, block.norm2, model.stages[2].norm)} == {kinds[0]}
    acts = (model.stem[1], block.mlp.act, block.mixer.act, model.stages[2].act, model.head.act)
    assert {type(act) for act in acts} == {kinds[1]}
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_a_double_skip_adds_the_input_to_both_halves():
    block = timm.create_model("zoo_affnet_et", double_skip=True, **SMALL).eval().stages[2].blocks[0]
    x = torch.randn(1, 5, 7, 16)
    half = block.norm1(x)
    half = x + half + block.mlp(half)
    torch.testing.assert_close(block(x), half + block.mixer(block.norm2(half)))


def test_unknown_norms_and_activations_are_named():
    with pytest.raises(ValueError, match="unknown norm_layer='rms', expected one of layer_norm_2d, layer_norm, batch_"):
        timm.create_model("zoo_affnet_et", norm_layer="rms")
    with pytest.raises(ValueError, match="unknown act_layer='silly', expected one of swish, relu"):
        timm.create_model("zoo_affnet_et", act_layer="silly")


def test_rows_of_equal_numbers_have_finite_second_derivatives():
    torch.manual_seed(0)
    x = torch.cat([torch.full((1, 6), 0.5), torch.randn(2, 6)]).double().requires_grad_()
    norm = DeviationNorm(6).double()
    assert torch.allclose(norm(x), (x - x.mean(-1, True)) / (x.std(-1, correction=0, keepdim=True) + 1e-5), rtol=1e-12)
    grad = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)[0]
    grad.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad[1:].abs().min() > 0
