"""FFNet's options, and what fusing makes of its branches."""

import timm
import torch
from quick import draw_weights, quick_model
from timm.layers import SqueezeExcite
from torch import nn

import visionzoo
from visionzoo.layers.conv_norm import BranchedDepthwiseConv, ResidualConvNorm

TINY = {"depths": (1, 2, 2, 1), "embed_dims": (8, 16, 32, 64), "stem_dim": 8}


@torch.no_grad()
def test_fused_branches_are_one_convolution_each():
    model = quick_model("zoo_ffnet_2", **TINY)
    branched = [name for name, module in model.named_modules() if isinstance(module, BranchedDepthwiseConv)]
    assert len(branched) == 3 + 6 + 6  # downsamplings, MLPs, two for each mixer of the last two stages
    fused = visionzoo.fuse(model)
    assert all(fused.get_submodule(name).small is None for name in branched)
    assert fused.get_submodule(branched[0]).large.conv.weight.shape == (8, 1, 7, 7)
    assert [name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)] == ["norm"]
    image = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(fused(image), model(image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(visionzoo.fuse(fused)(image), fused(image), rtol=0, atol=0)


@torch.no_grad()
def test_a_branch_sees_each_channel_with_several_kernels_and_the_residual_merges():
    torch.manual_seed(0)
    layers = nn.Sequential(BranchedDepthwiseConv(3, 6, 7, 2), ResidualConvNorm(6)).double()
    draw_weights(layers).eval()
    for module in layers.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 9, 10, 3, dtype=torch.float64)
    out = layers(x)
    assert out.shape == (1, 5, 5, 6)
    fused = visionzoo.fuse(layers)
    torch.testing.assert_close(fused(x), out, rtol=1e-12, atol=1e-12)
    assert len(list(fused.parameters())) == 4  # a weight and a bias of each
    x[..., 1] += 1.0
    changed = (layers[0](x) - layers[0](x - torch.tensor([0, 1.0, 0]))).abs().sum((0, 1, 2))
    assert changed.bool().tolist() == [False, False, True, True, False, False]


def test_squeeze_and_excitation_is_in_every_second_block_and_last_norm_and_activation_can_be_others():
    model = timm.create_model(
        "zoo_ffnet_1",
        **TINY,
        squeeze_excite=(False, True, True, False),
        layer_norm_last=True,
        act_layers=(nn.ReLU,) * 4,
    )
    excited = [
        [isinstance(getattr(block.cpe2, "se", None), SqueezeExcite) for block in stage.blocks] for stage in model.stages
    ]
    assert excited == [[False], [True, False], [True, False], [False]]
    assert isinstance(model.norm, nn.LayerNorm) and model.norm.eps == 1e-6
    blocks = [block for stage in model.stages for block in stage.blocks]
    acts = {type(module) for block in blocks for module in (block.mixer.act, block.mlp.act)}
    assert acts == {nn.ReLU}
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
