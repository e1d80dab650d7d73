"""Triton kernels of layer normalization, forward and backward.

A program holds as many whole rows as make a tile of a few thousand numbers; the backward pass computes the statistics
anew, since it reads the rows anyway. Gradients of scale and shift are summed a program, then over a fixed number of
programs: results are the same from run to run.
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


def forward(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Normalize [..., C] as `layer_norm` says."""
    return _normalize(x, weight, bias, eps, out_dtype)


# -- operators --------------------------------------------------------------------------------------------------------


def _normalize_fake(x, weight, bias, eps, out_dtype):
    return torch.empty(x.shape, dtype=out_dtype, device=x.device)


def _save(ctx, inputs, output):
    x, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x, grads = _normalize_backward(grad, x, weight, ctx.eps)
    return grad_x, *grads.unbind(), None, None


@operator("layer_norm", fake=_normalize_fake, save=_save, differentiate=_differentiate)
def _normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Normalize the last axis: [..., C] in `out_dtype`."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rows, width, options = _tiles(x)
    run(_forward_kernel, blocks(rows, options["ROWS"]), x, weight, bias, out, rows, width, eps, **options)
    return out


def _normalize_backward_fake(grad, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty((2, *weight.shape))


@operator("layer_norm_backward", fake=_normalize_backward_fake)
def _normalize_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and, one behind the other, of weight and bias."""
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width, options = _tiles(x)
    programs = max(1, min(_PARTS, blocks(rows, options["ROWS"])))
    parts = torch.empty((2, programs, width), dtype=torch.float32, device=x.device)
    run(_backward_kernel, programs, grad, x, weight, grad_x, parts, rows, width, eps, **options)
    return grad_x, parts.sum(1).to(weight.dtype)


def _tiles(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, their width, and the tile of a program."""
    width = x.shape[-1]
    block = max(16, 1 << (width - 1).bit_length())
    return x.numel() // max(1, width), width, {"ROWS": max(1, _TILE // block), "BLOCK": block, "num_warps": 4}


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _normalized(x, column, width, eps):
    """Rows of mean 0 and variance 1, and what they were multiplied by."""
    mean = tl.sum(x, 1) / width
    centred = tl.where((column < width)[None, :], x - mean[:, None], 0.0)
    factor = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
    return centred * factor[:, None], factor


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(x, weight, bias, out, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * width + column[None, :]
    mask = (row < rows)[:, None] & (column < width)[None, :]
    normalized, _ = _normalized(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), column, width, eps)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + at, (normalized * scale[None, :] + shift[None, :]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(grad, x, weight, grad_x, parts, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    grad_scale = tl.zeros([BLOCK], tl.float32)
    grad_shift = tl.zeros([BLOCK], tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), programs):
        row = (program * 0).to(tl.int64) + block
        row = row * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * width + column[None, :]
        mask = (row < rows)[:, None] & (column < width)[None, :]
        normalized, factor = _normalized(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), column, width, eps)
        grads = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        grad_shift += tl.sum(grads, 0)
        grad_scale += tl.sum(grads * normalized, 0)
        grads *= scale[None, :]
        grads -= (tl.sum(grads, 1)[:, None] + normalized * tl.sum(grads * normalized, 1)[:, None]) / width
        tl.store(grad_x + at, (grads * factor[:, None]).to(grad_x.dtype.element_ty), mask=mask)
    tl.store(parts + program * width + column, grad_scale, mask=column < width)
    tl.store(parts + (programs + program) * width + column, grad_shift, mask=column < width)
