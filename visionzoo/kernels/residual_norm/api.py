"""The sum at the end of a residual branch and the layer norm before the next one, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.kernels import scope
from visionzoo.kernels.dispatch import DTYPES, NOT_PAYING, choose
from visionzoo.kernels.precision import autocast_dtype
from visionzoo.kernels.residual_norm import reference

MAX_WIDTH = 1024  # a program holds whole rows


def residual_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    factor: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to what it branched from, y = x + scale · factor · branch, and normalize the sum over its last axis.

    "auto" does not take the Triton kernels (`visionzoo.kernels.dispatch.NOT_PAYING`): on an H200, in bfloat16 and as a
    CUDA graph, they were 1.2 to 3 times as fast forward as torch's addition and our norm, and 0.9 to 1.2 times with
    the backward pass (benchmarks/nvidia-h200). Nor does it under torch.compile, which fuses the plain form.

    Args:
        x: [B, ..., C].
        branch: [B, ..., C].
        weight: of the norm [C].
        bias: of the norm [C].
        scale: of the branch, for each channel [C] (LayerScale); None for 1.
        factor: of the branch, for each sample [B] (stochastic depth), which gets no gradient; None for 1.
        eps: added to the variance.
        backend: "auto", "reference" or "triton".

    Returns:
        y [B, ..., C] in the widest dtype of x, branch, scale and factor, and its layer norm [B, ..., C], in that dtype
        too, or under autocast in autocast's. Sums and statistics are float32 at least.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or the backend cannot run.
    """
    named = {"x": x, "branch": branch, "weight": weight, "bias": bias, "scale": scale, "factor": factor}
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    if x.ndim < 2 or branch.shape != x.shape:
        raise ValueError(
            f"residual_norm: x and branch must have one shape [B, ..., C], got {tuple(x.shape)} and "
            f"{tuple(branch.shape)}"
        )
    for name, axis in (("weight", -1), ("bias", -1), ("scale", -1), ("factor", 0)):
        if name in given and given[name].shape != (x.shape[axis],):
            raise ValueError(
                f"residual_norm: {name} must be [{'C' if axis else 'B'}] for x [B, ..., C], got "
                f"{tuple(given[name].shape)} for x {tuple(x.shape)}"
            )
    if not all(t.is_floating_point() and t.device == x.device for t in given.values()):
        kinds = ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in given.items())
        raise ValueError(f"residual_norm: tensors must be floating point on one device, got {kinds}")
    if factor is not None and factor.requires_grad:
        raise ValueError("residual_norm: factor gets no gradient, and requires one; pass factor.detach()")
    dtype = sum_dtype(x, branch, scale, factor)
    out_dtype = autocast_dtype(x.device) or dtype
    if _choose(backend, x, _unsupported(branch.dtype, dtype)) == "triton":
        from visionzoo.kernels.residual_norm import triton

        return triton.forward(x, branch, weight, bias, scale, factor, eps=eps, dtype=dtype, out_dtype=out_dtype)
    return reference.forward(x, branch, weight, bias, scale, factor, eps=eps, dtype=dtype, out_dtype=out_dtype)


def may_take_kernels() -> bool:
    """Whether layers take the Triton kernels for anything here, without a look at tensors: each block asks."""
    return scope.backend != "auto" or "residual_norm" not in NOT_PAYING


def takes_kernels(x: Tensor, branch: Tensor) -> bool:
    """Whether layers take the Triton kernels for these; else an addition and a norm of their own are the better."""
    return _choose("auto", x, _unsupported(branch.dtype, x.dtype), tell=False) == "triton"


def sum_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the widest dtype of tensors, which their sum has."""
    first, *others = [tensor.dtype for tensor in tensors if tensor is not None]
    for other in others:
        first = torch.promote_types(first, other)
    return first


def _choose(backend: str, x: Tensor, unsupported: str | None, tell: bool = True) -> str:
    avoid = "torch.compile fuses the plain form with its neighbors" if torch.compiler.is_compiling() else None
    return choose(
        "residual_norm",
        backend,
        x,
        unsupported=unsupported,
        avoid=avoid,
        max_width=MAX_WIDTH,
        max_numbers=None,
        tell=tell,
    )


def _unsupported(*dtypes: torch.dtype) -> str | None:
    wrong = [str(dtype) for dtype in dtypes if dtype not in DTYPES]
    return f"its kernels take {', '.join(map(str, DTYPES))}, got a branch or a sum of {wrong[0]}" if wrong else None
