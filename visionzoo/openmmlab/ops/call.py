"""How all ops here compute: in float32 at least, and their gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: torchvision's kernels have no bfloat16, and sums want more than float16."""
    return torch.promote_types(x.dtype, torch.float32)


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `function(*inputs)`, which runs once more for it.

    mmcv's ops are autograd functions whose backward pass asks the extension for gradients; they keep their inputs for
    it, not torch's graph.
    """
    with torch.enable_grad():
        inputs = [x.detach().to(compute_dtype(x)).requires_grad_() for x in inputs]
        output = function(*inputs)
    return torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
