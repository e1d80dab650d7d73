"""The block adds its branches as its docstring says, in few passes over memory."""

import pytest
import torch

from visionzoo.layers.block import Block
from visionzoo.layers.mixers import PoolMixer
from visionzoo.layers.mlp import IstaStep


def _written_out(block, x):
    x = x + block.cpe1(x)
    x = x + block.drop_path(block.ls1(block.mixer(block.norm1(x))))
    return x + block.drop_path(block.ls2(block.mlp(block.norm2(x))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_branches_are_scaled_dropped_and_added(layer_scale, training):
    torch.manual_seed(0)
    block = Block(8, PoolMixer(8), cpe_kernels=(3, None), layer_scale=layer_scale, drop_path=0.5).double()
    block.train(training)
    x = torch.randn(6, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (block, lambda x: _written_out(block, x)):
        torch.manual_seed(1)  # the same samples are dropped
        out = function(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer_scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_stream_as_precise_as_a_plain_sum(layer_scale, dtype):
    block = Block(8, PoolMixer(8), layer_scale=layer_scale, drop_path=0.5)
    x = torch.randn(2, 3, 3, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == (torch.float32 if layer_scale else dtype)


@torch.no_grad()
def test_a_step_towards_codes_is_one_of_gradient_and_shrinkage():
    """It is the gradient of ½‖x - D·z‖² at z = x, and soft thresholding that leaves nothing below zero."""
    step = IstaStep(6, step_size=0.3, penalty=0.2).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    for token, code in zip(x, step(x), strict=True):
        with torch.enable_grad():
            z = token.clone().requires_grad_()
            gradient = torch.autograd.grad((token - step.weight @ z).square().sum() / 2, z)[0]
        torch.testing.assert_close(code, (token - 0.3 * gradient - 0.3 * 0.2).clamp(min=0))
    assert (step(x) == 0).any() and (step(x) > 0).any()
    for options in ({"step_size": 0.0}, {"penalty": -0.1}):
        with pytest.raises(ValueError, match=r"step_size must be positive and penalty not negative, got step_size="):
            IstaStep(6, **options)
