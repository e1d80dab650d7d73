"""The block adds its branches as its docstring says, in few passes over memory."""

import pytest
import torch

from visionzoo.layers.block import Block
from visionzoo.layers.mixers import PoolMixer


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
