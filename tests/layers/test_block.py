"""The block adds its branches as its docstring says, in few passes over memory."""

import pytest
import torch
from kernels.triton_checks import DEVICE
from torch import fx, nn

from visionzoo.kernels import dispatch, explain, use_backend
from visionzoo.layers.block import Block
from visionzoo.layers.mixers import PoolMixer
from visionzoo.layers.mlp import IstaStep
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.norm import ScaleNorm
from visionzoo.layers.tokens import TokenBlock, Tokens
from visionzoo.models.lambda_vit import FadingBlock


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


def _on_tokens(block):
    """Take a map's first row for prefix tokens."""
    return lambda x: block(Tokens(x.flatten(1, 2), (x.shape[1] - 1, x.shape[2]), x.shape[2])).x


def _ran(block, x, backend="triton"):
    """Return what a block gives on a map, the gradients, and which operations it ran."""
    function = _on_tokens(block) if isinstance(block, TokenBlock) else block
    torch.manual_seed(1)  # the same samples are dropped
    with use_backend(backend), explain() as decisions:
        out = function(x)
    grads = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
    return [out, *grads], [(decision.operation, decision.backend) for decision in decisions]


def _map(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


FORMS = [{}, {"layer_scale": 0.3}, {"drop_path": 0.5}, {"layer_scale": 0.3, "drop_path": 0.5}]
JOINED = [("layer_norm", "triton"), ("residual_norm", "triton")]
APART = [("layer_norm", "triton"), ("layer_norm", "triton")]


@pytest.mark.parametrize("kind", [Block, TokenBlock, FadingBlock])
@pytest.mark.parametrize(
    "options", [{}, {"layer_scale": 0.3}, {"drop_path": 0.5}, {"layer_scale": 0.3, "drop_path": 0.5}]
)
def test_a_sum_and_the_norm_after_it_are_one_operation_with_the_same_results(kind, options):
    torch.manual_seed(0)
    block, x = kind(16, PoolMixer(16), **options).to(DEVICE), _map(4, 3, 6, 16)
    if kind is FadingBlock:
        block.share.fill_(0.25)
    joined, operations = _ran(block, x)
    assert operations == JOINED
    apart, operations = _ran(block, x, "reference")
    assert operations == [("layer_norm", "reference")] * 2
    torch.testing.assert_close(joined, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.3, "drop_path": 0.5}])
def test_autocast_gives_one_operation_the_dtypes_of_two(options, low):
    block, x = Block(16, PoolMixer(16), **options).to(DEVICE), _map(2, 3, 3, 16)
    for dtype in (torch.float32, low):
        seen = []
        block.mlp.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].dtype))
        with torch.autocast(DEVICE, low):
            outs = [_ran(block, x.detach().to(dtype).requires_grad_(), name)[0][0] for name in ("triton", "reference")]
        assert outs[0].dtype == outs[1].dtype and seen == [low, low]


def test_what_looks_at_the_norm_or_stands_before_it_leaves_them_apart():
    x, seen = _map(2, 3, 6, 16), []
    block = Block(16, PoolMixer(16), layer_scale=0.3).to(DEVICE)
    for module in (block.norm2, block.ls1):
        handle = module.register_forward_hook(lambda module, args, out: seen.append(module))
        assert _ran(block, x)[1] == APART
        handle.remove()
        assert _ran(block, x)[1] == JOINED
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    assert _ran(block, x)[1] == APART
    handle.remove()
    assert seen[:2] == [block.norm2, block.ls1] and block.norm2 in seen[2:]

    class Norm(type(block.norm2)):
        """Someone else's."""

    for changed in (
        Block(16, PoolMixer(16), mlp_norm_layer=Norm),
        Block(16, PoolMixer(16), mlp_norm_layer=lambda dim: type(block.norm2)(dim, bias=False)),
        Block(16, PoolMixer(16), mlp_norm_layer=ScaleNorm),
        Block(16, PoolMixer(16), cpe_kernels=(None, 3)),
    ):
        assert ("residual_norm", "triton") not in _ran(changed.to(DEVICE), x)[1]
    assert isinstance(changed.cpe2, DepthwiseConvNHWC)


def test_a_trace_has_two_operations():
    block, x = Block(16, PoolMixer(16)).to(DEVICE).eval(), _map(2, 3, 6, 16)
    with use_backend("triton"):
        graph = fx.symbolic_trace(block)
    assert any(str(node.target) == "norm2" for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), block(x))


def test_auto_keeps_them_apart_until_a_measurement_says_that_one_pays(monkeypatch):
    monkeypatch.setattr(dispatch, "_why_not", lambda *_: None)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    block, x = Block(16, PoolMixer(16)).to(DEVICE), _map(2, 3, 6, 16)
    assert ("residual_norm", "triton") not in _ran(block, x, "auto")[1]
    with dispatch.as_if_paying("residual_norm", True):
        assert _ran(block, x, "auto")[1][-1] == ("residual_norm", "triton")


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
