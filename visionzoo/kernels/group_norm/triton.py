"""Triton kernels of group normalization with one group, forward and backward.

A sample is cut into as many parts as let a GPU work on all of them at once. One kernel sums over each part, the next
adds up a sample's sums, always in the same order, and writes: results are the same from run to run. Of a small map
each sample is one part, and one kernel does both forward. Means and squared deviations are joined part by part (Chan,
Golub and LeVeque), so that large means cost no digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels.launch import blocks, run, token_rows
from visionzoo.kernels.operator import operator

_TILE = 4096  # numbers
_PROGRAMS = 1024  # about eight for each multiprocessor of a large GPU
_SMALL = 2**15  # numbers of maps whose samples are one part each: their forward pass is one launch
_MAX_PARTS = 64  # of a sample


def forward(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Normalize [B, H, W, C] as `group_norm` says."""
    return _normalize(x, weight, bias, eps, out_dtype)[0]


# -- operators --------------------------------------------------------------------------------------------------------


def _normalize_fake(x, weight, bias, eps, out_dtype):
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    return out, x.new_empty((x.shape[0], _MAX_PARTS, 2), dtype=torch.float32)


def _save(ctx, inputs, output):
    x, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_sums):
    if grad is None:
        return (None,) * 5
    x, weight, sums = ctx.saved_tensors
    grad_x, grads = _normalize_backward(grad, x, weight, sums, ctx.eps)
    return grad_x, *grads.unbind(), None, None


@operator("group_norm", fake=_normalize_fake, save=_save, differentiate=_differentiate)
def _normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output [B, H, W, C] and, for the backward pass, mean and squared deviations of the parts of each sample."""
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    sums = torch.empty((x.shape[0], _MAX_PARTS, 2), dtype=torch.float32, device=x.device)
    call = _Call(x)
    if call.parts == 1:  # a launch costs more than reading a small map again
        call.launch(_whole_kernel, sums, weight, bias, out, eps)
    else:
        call.launch(_sum_kernel, sums)
        call.launch(_forward_kernel, sums, weight, bias, out, eps)
    return out, sums


def _normalize_backward_fake(grad, x, weight, sums, eps):
    return x.new_empty(x.shape), weight.new_empty((2, *weight.shape))


@operator("group_norm_backward", fake=_normalize_backward_fake)
def _normalize_backward(grad: Tensor, x: Tensor, weight: Tensor, sums: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and, one behind the other, of weight and bias."""
    call = _Call(x)
    grad = grad.contiguous()
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_sums = torch.empty_like(sums)
    shares = torch.empty((2, len(x) * call.parts, x.shape[3]), dtype=torch.float32, device=x.device)
    call.launch(_grad_sum_kernel, sums, weight, grad, grad_sums, shares, eps)
    call.launch(_grad_kernel, sums, weight, grad, grad_sums, grad_x, eps)
    return grad_x, shares.sum(1).to(weight.dtype)


class _Call:
    """A map, and how its samples are cut into parts of whole tiles."""

    def __init__(self, x: Tensor):
        rows, step = token_rows(x)
        batch, height, width, channels = x.shape
        block = max(16, 1 << (channels - 1).bit_length())
        tall, tokens = max(1, _TILE // block), height * width
        wanted = min(_MAX_PARTS, blocks(_PROGRAMS, max(1, batch))) if x.numel() > _SMALL else 1
        part = blocks(blocks(tokens, wanted), tall) * tall
        self.batch, self.parts = batch, blocks(tokens, part)
        self.arguments = rows, step, tokens, part, channels
        self.options = {"MAX_PARTS": _MAX_PARTS, "ROWS": tall, "BLOCK": block, "num_warps": 4}

    def launch(self, kernel, *tensors) -> None:
        """Run a kernel with this map, then `tensors`, on every part."""
        run(kernel, self.batch * self.parts, *self.arguments, *tensors, **self.options)


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _part(tokens, part):
    """Sample of this program, and where its part of the tokens starts and ends."""
    parts = tl.cdiv(tokens, part)
    first = tl.program_id(0) % parts * part
    return (tl.program_id(0) // parts).to(tl.int64), first, tl.minimum(first + part, tokens)


@triton.jit
def _load(pointer, step, start, end, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens [ROWS, channels] in float32, zeros from `end` on, and which numbers exist."""
    token, c = start + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (token < end)[:, None] & (c < channels)[None, :]
    return tl.load(pointer + (token * step)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32), mask


@triton.jit
def _store(pointer, values, start, channels, mask, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write tokens [ROWS, channels]."""
    token, c = start + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    tl.store(pointer + (token * channels)[:, None] + c[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _affine(pointer, channels, BLOCK: tl.constexpr):
    """Scale or shift [1, channels] in float32."""
    c = tl.arange(0, BLOCK)
    return tl.load(pointer + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_sums(sums, b, parts, MAX_PARTS: tl.constexpr):
    """Both sums of a sample's parts, zeros for those that it does not have."""
    p = tl.arange(0, MAX_PARTS)
    sums += (b * MAX_PARTS + p) * 2
    return tl.load(sums, mask=p < parts, other=0.0), tl.load(sums + 1, mask=p < parts, other=0.0)


@triton.jit
def _store_sums(sums, b, p, first, second, MAX_PARTS: tl.constexpr):
    """Write both sums of a part."""
    sums += (b * MAX_PARTS + p) * 2
    tl.store(sums, first)
    tl.store(sums + 1, second)


@triton.jit
def _clear_sums(sums, b, first, parts, MAX_PARTS: tl.constexpr):
    """Write zeros for the parts that a sample does not have; its first part does."""
    p = tl.arange(0, MAX_PARTS)
    unused = (p >= parts) & (first == 0)
    sums += (b * MAX_PARTS + p) * 2
    tl.store(sums, tl.zeros([MAX_PARTS], tl.float32), mask=unused)
    tl.store(sums + 1, tl.zeros([MAX_PARTS], tl.float32), mask=unused)


@triton.jit
def _statistics(sums, b, tokens, part, channels, eps, MAX_PARTS: tl.constexpr):
    """Mean of a sample, and what its deviations are multiplied by."""
    means, deviations = _load_sums(sums, b, tl.cdiv(tokens, part), MAX_PARTS)
    p = tl.arange(0, MAX_PARTS)
    numbers = tl.maximum(tl.minimum(part, tokens - p * part), 0).to(tl.float32) * channels
    total = tokens.to(tl.float32) * channels
    mean = tl.sum(means * numbers, 0) / total
    means -= mean
    variance = tl.sum(deviations + means * means * numbers, 0) / total
    return mean, 1 / tl.sqrt_rn(variance + eps)


@triton.jit
def _part_sums(x, step, first, end, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and squared deviations of a sample's tokens from `first` to `end`."""
    mean, deviations, count = 0.0, 0.0, 0.0
    for start in range(first, end, ROWS):
        values, mask = _load(x, step, start, end, channels, ROWS, BLOCK)
        more = tl.minimum(end - start, ROWS).to(tl.float32) * channels
        own = tl.sum(values) / more
        values = tl.where(mask, values - own, 0.0)
        count += more
        own -= mean
        deviations += tl.sum(values * values) + own * own * (count - more) * more / count
        mean += own * more / count
    return mean, deviations


@triton.jit
def _write(x, step, first, end, channels, mean, factor, weight, bias, out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a sample's tokens from `first` to `end`, normalized."""
    scale = _affine(weight, channels, BLOCK) * factor
    shift = _affine(bias, channels, BLOCK)
    for start in range(first, end, ROWS):
        values, mask = _load(x, step, start, end, channels, ROWS, BLOCK)
        _store(out, (values - mean) * scale + shift, start, channels, mask, ROWS, BLOCK)


@triton.jit(do_not_specialize=["tokens", "part"])
def _sum_kernel(
    x, step, tokens, part, channels, sums, MAX_PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write mean and squared deviations of a part."""
    b, first, end = _part(tokens, part)
    mean, deviations = _part_sums(x + b * tokens * step, step, first, end, channels, ROWS, BLOCK)
    _store_sums(sums, b, first // part, mean, deviations, MAX_PARTS)
    _clear_sums(sums, b, first, tl.cdiv(tokens, part), MAX_PARTS)


@triton.jit(do_not_specialize=["tokens", "part"])
def _whole_kernel(
    x, step, tokens, part, channels, sums, weight, bias, out, eps,
    MAX_PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize a sample that is one part, and write its sums."""
    b, first, end = _part(tokens, part)
    x += b * tokens * step
    out += b * tokens * channels
    mean, deviations = _part_sums(x, step, first, end, channels, ROWS, BLOCK)
    _store_sums(sums, b, 0, mean, deviations, MAX_PARTS)
    _clear_sums(sums, b, 0, 1, MAX_PARTS)
    factor = 1 / tl.sqrt_rn(deviations / (tokens.to(tl.float32) * channels) + eps)
    _write(x, step, first, end, channels, mean, factor, weight, bias, out, ROWS, BLOCK)


@triton.jit(do_not_specialize=["tokens", "part"])
def _forward_kernel(
    x, step, tokens, part, channels, sums, weight, bias, out, eps,
    MAX_PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize a part."""
    b, first, end = _part(tokens, part)
    x += b * tokens * step
    out += b * tokens * channels
    mean, factor = _statistics(sums, b, tokens, part, channels, eps, MAX_PARTS)
    _write(x, step, first, end, channels, mean, factor, weight, bias, out, ROWS, BLOCK)


@triton.jit(do_not_specialize=["tokens", "part"])
def _grad_sum_kernel(
    x, step, tokens, part, channels, sums, weight, grad, grad_sums, shares, eps,
    MAX_PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute sums over a part that its sample's gradient needs, and its shares of the gradients of scale and shift."""
    b, first, end = _part(tokens, part)
    x += b * tokens * step
    grad += b * tokens * channels
    mean, factor = _statistics(sums, b, tokens, part, channels, eps, MAX_PARTS)
    grad_scale = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_shift = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, end, ROWS):
        values, _ = _load(x, step, start, end, channels, ROWS, BLOCK)
        grads, _ = _load(grad, channels, start, end, channels, ROWS, BLOCK)
        grad_scale += grads * ((values - mean) * factor)  # the gradients are 0 where nothing is
        grad_shift += grads
    grad_scale, grad_shift = tl.sum(grad_scale, 0), tl.sum(grad_shift, 0)
    c = tl.arange(0, BLOCK)
    shares += tl.program_id(0).to(tl.int64) * channels + c
    tl.store(shares, grad_scale, mask=c < channels)
    tl.store(shares + tl.num_programs(0).to(tl.int64) * channels, grad_shift, mask=c < channels)
    scale = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    _store_sums(grad_sums, b, first // part, tl.sum(grad_shift * scale, 0), tl.sum(grad_scale * scale, 0), MAX_PARTS)


@triton.jit(do_not_specialize=["tokens", "part"])
def _grad_kernel(
    x, step, tokens, part, channels, sums, weight, grad, grad_sums, grad_x, eps,
    MAX_PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a part."""
    b, first, end = _part(tokens, part)
    x += b * tokens * step
    grad += b * tokens * channels
    grad_x += b * tokens * channels
    mean, factor = _statistics(sums, b, tokens, part, channels, eps, MAX_PARTS)
    offsets, slopes = _load_sums(grad_sums, b, tl.cdiv(tokens, part), MAX_PARTS)
    total = tokens.to(tl.float32) * channels
    offset, slope = tl.sum(offsets, 0) / total, tl.sum(slopes, 0) / total
    scale = _affine(weight, channels, BLOCK)
    for start in range(first, end, ROWS):
        values, mask = _load(x, step, start, end, channels, ROWS, BLOCK)
        grads, _ = _load(grad, channels, start, end, channels, ROWS, BLOCK)
        grads = (grads * scale - offset - (values - mean) * factor * slope) * factor
        _store(grad_x, grads, start, channels, mask, ROWS, BLOCK)
