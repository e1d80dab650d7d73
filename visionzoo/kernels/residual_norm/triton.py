"""Triton kernels of a residual sum and its layer norm, forward and backward.

A program holds as many whole rows as make a tile of a few thousand numbers: it reads both terms once, writes the sum
and normalizes what it wrote, rounded as it is. The backward pass reads the sum and computes the statistics anew; it
adds the gradient that comes past the norm, which torch would do in a launch of its own. Gradients of the norm's scale
and shift and of the branch's scale are summed a program, then over a fixed number of programs: results are the same
from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels.launch import blocks, run
from visionzoo.kernels.operator import operator

_TILE = 4096  # numbers
_PARTS = 512  # programs of the backward pass: about four for each multiprocessor of a large GPU


def forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    *,
    eps: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Add [B, ..., C] in `dtype` and normalize the sum as `residual_norm` says."""
    return _add_and_normalize(x, branch, weight, bias, scale, factor, eps, dtype, out_dtype)


# -- operators --------------------------------------------------------------------------------------------------------


def _add_and_normalize_fake(x, branch, weight, bias, scale, factor, eps, dtype, out_dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=out_dtype)


def _save(ctx, inputs, output):
    x, branch, weight, bias, scale, factor, ctx.eps, _, _ = inputs
    ctx.save_for_backward(output[0], None if scale is None else branch, weight, scale, factor)
    ctx.dtypes = [t.dtype for t in (x, branch, weight, bias, scale) if t is not None]


def _differentiate(ctx, grad_y, grad_out):
    y, branch, weight, scale, factor = ctx.saved_tensors
    x_dtype, branch_dtype, *dtypes = ctx.dtypes
    grad_x, grad_branch, sums = _add_and_normalize_backward(
        grad_y, grad_out, y, branch, weight, scale, factor, ctx.eps, x_dtype, branch_dtype
    )
    if grad_branch.shape != grad_x.shape:  # it would be the same
        grad_branch = grad_x
    rows = [row.to(dtype) for row, dtype in zip(sums.unbind(), dtypes, strict=True)]
    return grad_x, grad_branch, *rows, *[None] * (7 - len(rows))


@operator("residual_norm", fake=_add_and_normalize_fake, save=_save, differentiate=_differentiate)
def _add_and_normalize(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Sum [B, ..., C] in `dtype` and its norm in `out_dtype`."""
    x, branch = x.contiguous(), branch.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rows, length, width, options = _tiles(x)
    programs = blocks(rows, options["ROWS"])
    run(_forward_kernel, programs, x, branch, weight, bias, scale, factor, y, out, rows, length, width, eps, **options)
    return y, out


def _add_and_normalize_backward_fake(grad_y, grad_out, y, branch, weight, scale, factor, eps, x_dtype, branch_dtype):
    own = scale is not None or factor is not None or x_dtype != branch_dtype
    return (
        y.new_empty(y.shape, dtype=x_dtype),
        y.new_empty(y.shape if own else 0, dtype=branch_dtype),
        y.new_empty((2 if scale is None else 3, y.shape[-1]), dtype=torch.float32),
    )


@operator("residual_norm_backward", fake=_add_and_normalize_backward_fake)
def _add_and_normalize_backward(
    grad_y: Tensor,
    grad_out: Tensor,
    y: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    eps: float,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of branch (empty where it is that of x) and, in float32, of weight, bias and the scale."""
    grad_y, grad_out, y = grad_y.contiguous(), grad_out.contiguous(), y.contiguous()
    branch = None if branch is None else branch.contiguous()
    grad_x = torch.empty(y.shape, dtype=x_dtype, device=y.device)
    own = scale is not None or factor is not None or x_dtype != branch_dtype
    grad_branch = torch.empty(y.shape if own else 0, dtype=branch_dtype, device=y.device)
    rows, length, width, options = _tiles(y)
    programs = max(1, min(_PARTS, blocks(rows, options["ROWS"])))
    parts = torch.empty((2 if scale is None else 3, programs, width), dtype=torch.float32, device=y.device)
    tensors = (grad_y, grad_out, y, branch, weight, scale, factor, grad_x, grad_branch if own else None, parts)
    run(_backward_kernel, programs, *tensors, rows, length, width, eps, **options)
    return grad_x, grad_branch, parts.sum(1)


def _tiles(x: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Rows, those of a sample, their width, and the tile of a program."""
    width = x.shape[-1]
    rows = x.numel() // max(1, width)
    block = max(16, 1 << (width - 1).bit_length())
    options = {"ROWS": max(1, _TILE // block), "BLOCK": block, "num_warps": 4}
    return rows, max(1, rows // max(1, x.shape[0])), width, options


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _multiplier(scale, factor, row, rows, length, column, width):
    """Read what the branch is multiplied by, [rows, 1] or [rows, columns]: its scale, the sample's factor, or both."""
    multiplier = (row * 0 + 1).to(tl.float32)[:, None]
    if factor is not None:
        multiplier = tl.load(factor + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if scale is not None:
        multiplier *= tl.load(scale + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    return multiplier


@triton.jit
def _normalized(y, column, width, eps):
    """Rows of mean 0 and variance 1, and what they were multiplied by."""
    mean = tl.sum(y, 1) / width
    centered = tl.where((column < width)[None, :], y - mean[:, None], 0.0)
    shrink = 1 / tl.sqrt_rn(tl.sum(centered * centered, 1) / width + eps)
    return centered * shrink[:, None], shrink


@triton.jit(do_not_specialize=["rows", "length"])
def _forward_kernel(
    x, branch, weight, bias, scale, factor, y, out, rows, length, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * width + column[None, :]
    mask = (row < rows)[:, None] & (column < width)[None, :]
    added = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    if scale is not None or factor is not None:
        added *= _multiplier(scale, factor, row, rows, length, column, width)
    total = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + added).to(y.dtype.element_ty)
    tl.store(y + at, total, mask=mask)
    normalized, _ = _normalized(total.to(tl.float32), column, width, eps)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + at, (normalized * gain[None, :] + shift[None, :]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "length"])
def _backward_kernel(
    grad_y, grad_out, y, branch, weight, scale, factor, grad_x, grad_branch, parts, rows, length, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    grad_gain = tl.zeros([BLOCK], tl.float32)
    grad_shift = tl.zeros([BLOCK], tl.float32)
    grad_scale = tl.zeros([BLOCK], tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), programs):
        row = (program * 0).to(tl.int64) + block
        row = row * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * width + column[None, :]
        mask = (row < rows)[:, None] & (column < width)[None, :]
        normalized, shrink = _normalized(tl.load(y + at, mask=mask, other=0.0).to(tl.float32), column, width, eps)
        grads = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
        grad_shift += tl.sum(grads, 0)
        grad_gain += tl.sum(grads * normalized, 0)
        grads *= gain[None, :]
        grads -= (tl.sum(grads, 1)[:, None] + normalized * tl.sum(grads * normalized, 1)[:, None]) / width
        grads = grads * shrink[:, None] + tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + at, grads.to(grad_x.dtype.element_ty), mask=mask)
        if grad_branch is not None:
            multiplied = grads
            if scale is not None or factor is not None:
                multiplied *= _multiplier(scale, factor, row, rows, length, column, width)
            tl.store(grad_branch + at, multiplied.to(grad_branch.dtype.element_ty), mask=mask)
        if scale is not None:
            grads *= tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
            if factor is not None:
                grads *= tl.load(factor + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]
            grad_scale += tl.sum(tl.where(mask, grads, 0.0), 0)
    tl.store(parts + program * width + column, grad_gain, mask=column < width)
    tl.store(parts + (programs + program) * width + column, grad_shift, mask=column < width)
    if scale is not None:
        tl.store(parts + (2 * programs + program) * width + column, grad_scale, mask=column < width)
