"""What users of other attention kernels met, tried on every operation: each test names the kind of report."""

import pytest
import torch
from kernels.calls import HEAD_DIM, HEADS, KINDS
from kernels.triton_checks import DEVICE

from visionzoo.kernels import use_backend


def _run(kind, backend, size, grad, heads_first=False):
    """Output and gradients of maps and parameters, the output's gradient made by `grad`."""
    generator = torch.Generator().manual_seed(5)
    shape = (size[0], HEADS, *size[1:], HEAD_DIM) if heads_first else (*size, HEADS, HEAD_DIM)
    maps = [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3)]
    if heads_first:
        maps = [t.permute(0, 2, 3, 1, 4) for t in maps]
    parameters = {n: torch.randn(s, generator=generator).to(DEVICE) / 4 for n, s in kind.parameters.items()}
    leaves = [t.requires_grad_() for t in maps]
    learned = {n: t.requires_grad_() for n, t in parameters.items()}
    with use_backend(backend):
        out = kind.function(*leaves, **learned)
    tensors = [*leaves, *learned.values()]
    return [out.detach(), *torch.autograd.grad(out, tensors, grad(out), allow_unused=True)]


GRADIENTS = {  # of sums, which torch expands from one number; of a part of a wider tensor; of a transposed one
    "expanded": lambda out: torch.ones((), device=out.device).expand(out.shape),
    "part": lambda out: torch.ones((*out.shape[:-1], 2 * out.shape[-1]), device=out.device)[..., ::2],
    "transposed": lambda out: torch.ones_like(out.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    ),
}


FEW = ("regions routed, with weights and padding", "layer norm")  # with all gradients; the rest with --full


@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        pytest.param(name, gradient, marks=[] if gradient == "transposed" or name in FEW else pytest.mark.full)
        for name in KINDS
        for gradient in GRADIENTS
    ],
)
def test_gradients_that_come_in_other_strides(name, gradient):
    """fla#1138: a kernel took the output gradient's strides for another tensor's."""
    own, plain = (_run(KINDS[name], backend, (2, 4, 6), GRADIENTS[gradient]) for backend in ("triton", "reference"))
    for mine, expected in zip(own, plain, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", KINDS)
def test_maps_with_the_heads_in_front(name):
    """FlagGems#5896: values that are a transposed view were read as if they were contiguous."""
    own, plain = (_run(KINDS[name], backend, (2, 4, 6), torch.ones_like, True) for backend in ("triton", "reference"))
    for mine, expected in zip(own, plain, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", KINDS)
def test_batches_of_nothing(name, backend):
    """A grid of no programs, sums over nothing: outputs are empty, gradients of parameters zeros."""
    out, *grads = _run(KINDS[name], backend, (0, 4, 6), torch.ones_like)
    assert out.shape[0] == 0 and len(grads) == 3 + len(KINDS[name].parameters)
    for grad in grads[3:]:
        assert grad is not None and not grad.any()
