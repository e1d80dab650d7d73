"""Numbers that lie more than 2³¹ apart inside of a sample are read where they are, or refused by name."""

import pytest
import torch
from kernels.calls import HEAD_DIM, HEADS, KINDS
from kernels.triton_checks import DEVICE

from visionzoo.kernels import dispatch, neighborhood_attention, routed_attention, use_backend

SIZE, STEP = (6, 8), 2**26  # of the map, and numbers from token to token


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def _far(maps, step):
    """Views of equal maps [1, H, W, G, D] whose tokens lie `step` numbers apart, in memory that is not touched else."""
    height, width, heads, depth = maps[0].shape[1:]
    memory = torch.empty(height * width * step, dtype=maps[0].dtype, device=maps[0].device)
    views = []
    for i, t in enumerate(maps):
        strides = (0, width * step, step, depth, 1)
        views.append(memory.as_strided(t.shape, strides, i * heads * depth).copy_(t))
    return views


def _results(kind, maps, parameters):
    leaves = [t.detach().requires_grad_() for t in maps]
    out = kind.function(*leaves, **parameters)
    if not out.is_floating_point() or not out.requires_grad:
        return [out]
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)]


@pytest.mark.parametrize("name", KINDS)
def test_tokens_far_apart_are_read_where_they_are(name):
    kind, generator = KINDS[name], torch.Generator().manual_seed(0)
    maps = [torch.randn(1, *SIZE, HEADS, HEAD_DIM, generator=generator).to(DEVICE, torch.float16) for _ in range(3)]
    parameters = {n: torch.randn(shape, generator=generator).to(maps[0]) / 4 for n, shape in kind.parameters.items()}
    assert SIZE[0] * SIZE[1] * STEP > 2**31
    expected = _results(kind, maps, parameters)
    for own, other in zip(_results(kind, _far(maps, STEP), parameters), expected, strict=True):
        assert own is other is None or torch.equal(own, other)


OF_ROWS = ["layer_norm", "residual_norm"]  # which take any number of them


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].operations[0] not in OF_ROWS])
def test_samples_of_too_many_numbers_are_refused_by_name(name):
    kind = KINDS[name]
    maps = [torch.zeros((), device=DEVICE).expand(2, 2**14, 2**13, HEADS, HEAD_DIM)] * 3  # 2³² a sample
    parameters = {n: torch.zeros(shape, device=DEVICE) for n, shape in kind.parameters.items()}
    with pytest.raises(
        ValueError, match=rf"^{kind.operations[0]}: .* up to 2147483648 numbers a sample, got 4294967296"
    ):
        kind.function(*maps, **parameters)


@pytest.mark.parametrize("operation", OF_ROWS)
def test_norms_of_rows_take_any_number(operation):
    x = torch.zeros((), device=DEVICE).expand(2**21, 2**13, 16)
    assert dispatch.choose(operation, "triton", x, max_numbers=None) == "triton"


def test_a_bias_of_too_many_numbers_is_refused_by_name():
    q = torch.zeros(1, 256, 256, 1, 16, device=DEVICE)
    bias = torch.zeros((), device=DEVICE).expand(1, 2**16, 2**16)
    with pytest.raises(ValueError, match="up to 2147483648 numbers of a bias, got 4294967296"):
        routed_attention(q, q, q, None, regions=1, bias=bias)


def test_compiled_code_refuses_too_many_numbers_when_it_runs():
    x = torch.zeros((), device=DEVICE).expand(1, 2**14, 2**13, 1, 32)
    compiled = torch.compile(lambda x: neighborhood_attention(x, x, x, kernel_size=3), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="numbers of a sample, got 4294967296"):
        compiled(x)
