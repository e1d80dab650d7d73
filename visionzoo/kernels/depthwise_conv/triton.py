"""Triton kernels of the depthwise convolution, forward and backward; maps are read where they lie, never copied.

A program computes a tile of rows, columns and channels. For each column of the convolution's kernel it reads the rows
that the tile needs, each once, and adds their products to the sums of all rows of the tile, which stay in registers;
what it reads again for the next column comes from the first-level cache. The gradient of the input is the convolution
of the output's gradient with the kernel turned around. The gradients of weight and bias are summed over the tiles of
a program, then over programs, always in the same order: results are the same from run to run.

Products and sums are float32. Batch and map are plain arguments, so that a new image size compiles nothing new.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels.launch import dense_rows, row_strides

# arguments that vary with batch and image: the compiler must not look at their values
_SIZES = [
    "x_b", "x_h", "x_w", "r_b", "r_h", "r_w", "height", "width", "tall", "wide", "first", "step", "tiles", "splits",
]  # fmt: skip
_PROGRAMS = 1024  # that sum gradients of weights: enough to fill a GPU, few enough that summing theirs costs little


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None, regions: tuple[int, int] | None
) -> Tensor:
    """Convolution of [B, H, W, C] as `depthwise_conv` says."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    itself = residual is x  # the gradient of the sum is then computed as one
    return _convolve(x, weight, bias, None if itself else residual, itself, list(regions or ()), dtype)


# -- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("visionzoo::depthwise_conv", mutates_args=())
def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    add_x: bool,
    regions: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Convolution [B, H, W, C] of `dtype`, plus `residual`, or plus x with `add_x`."""
    x = dense_rows(x)
    return _launch(x, weight, bias, x if add_x else residual, regions, dtype)


@torch.library.custom_op("visionzoo::depthwise_conv_backward", mutates_args=())
def _convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    add_x: bool,
    regions: list[int],
    x_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias in weight's dtype; empty where they are not asked for."""
    grad, x = dense_rows(grad), dense_rows(x)
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if x_grad:
        grad_x = _launch(grad, weight, None, grad if add_x else None, regions, x.dtype, transposed=True)
    if weight_grad:
        grad_weight, grad_bias = _weight_grad(x, grad, weight, regions)
    return grad_x, grad_weight, grad_bias


@_convolve.register_fake
def _(x, weight, bias, residual, add_x, regions, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@_convolve_backward.register_fake
def _(grad, x, weight, add_x, regions, x_grad, weight_grad):
    return (
        x.new_empty(x.shape if x_grad else 0),
        weight.new_empty(weight.shape if weight_grad else 0),
        weight.new_empty(weight.shape[0] if weight_grad else 0),
    )


def _save(ctx, inputs, output):
    x, weight, bias, residual, ctx.add_x, ctx.regions, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad):
    if grad is None:
        return (None,) * 7
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    grad_x, grad_weight, grad_bias = _convolve_backward(
        grad, x, weight, ctx.add_x, ctx.regions, needs_x, needs_weight or needs_bias
    )
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_bias.to(ctx.bias_dtype) if needs_bias else None,
        grad.to(ctx.residual_dtype) if needs_residual else None,
        *[None] * 3,
    )


_convolve.register_autograd(_differentiate, setup_context=_save)


# -- launches ---------------------------------------------------------------------------------------------------------


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    regions: list[int],
    dtype: torch.dtype,
    transposed: bool = False,
) -> Tensor:
    """Run `_convolve_kernel`, with the kernel turned around if `transposed`."""
    batch, height, width, channels = x.shape
    kernel = weight.shape[-1]
    taps = torch.empty((kernel * kernel, channels), dtype=torch.float32, device=x.device)
    taps.copy_(weight.reshape(channels, -1).t())
    residual = None if residual is None else dense_rows(residual)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    strides = row_strides(x, x if residual is None else residual)
    align = math.gcd(8, channels, *strides)
    rows, columns, block = 8, 16 if width > 8 else 8, _channel_block(channels)
    programs = batch * triton.cdiv(height, rows) * triton.cdiv(width, columns) * triton.cdiv(channels, block)
    _convolve_kernel[(programs,)](
        x, taps, x if bias is None else bias, x if residual is None else residual, out,
        *[stride // align for stride in strides], height, width, channels // align, *_region_size(x, regions),
        *((kernel * kernel - 1, -1) if transposed else (0, 1)),
        K=kernel, ALIGN=align, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        HAS_REGIONS=bool(regions), ROWS=rows, COLUMNS=columns, CHANNELS=block,
        num_warps=max(1, columns * block // 256),  # 8 numbers a thread
    )  # fmt: skip
    return out


def _weight_grad(x: Tensor, grad: Tensor, weight: Tensor, regions: list[int]) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias."""
    batch, height, width, channels = x.shape
    kernel = weight.shape[-1]
    strides = row_strides(x, grad)
    align = math.gcd(8, channels, *strides)
    rows, columns, block = 4, 8, _channel_block(channels)
    tiles = batch * triton.cdiv(height, rows) * triton.cdiv(width, columns)
    splits = min(tiles, max(1, _PROGRAMS // triton.cdiv(channels, block)))
    parts = torch.empty((splits, kernel * kernel + 1, channels), dtype=torch.float32, device=x.device)
    numbers = 4 if kernel <= 3 else 2 if kernel <= 7 else 1  # a thread holds k² sums of each
    _weight_grad_kernel[(splits * triton.cdiv(channels, block),)](
        x, grad, parts, *[stride // align for stride in strides], height, width, channels // align,
        *_region_size(x, regions), tiles, splits,
        K=kernel, ALIGN=align, HAS_REGIONS=bool(regions), ROWS=rows, COLUMNS=columns, CHANNELS=block,
        num_warps=columns * block // 32 // numbers,
    )  # fmt: skip
    sums = parts.sum(0).to(weight.dtype)
    return sums[:-1].t().contiguous().view(weight.shape), sums[-1].clone()


def _channel_block(channels: int) -> int:
    """Channels of a tile: 64, or 32 where that wastes less."""
    return 64 if -channels % 64 < 32 else 32


def _region_size(x: Tensor, regions: list[int]) -> tuple[int, int]:
    rows, columns = regions or (1, 1)
    return x.shape[1] // rows, x.shape[2] // columns


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(program, height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels, columns, first row and sample of a tile; the tiles of one place lie side by side."""
    across = tl.cdiv(channels, CHANNELS)
    c = program % across * CHANNELS + tl.arange(0, CHANNELS)
    program //= across
    across = tl.cdiv(width, COLUMNS)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    program //= across
    across = tl.cdiv(height, ROWS)
    return c, column, program % across * ROWS, (program // across).to(tl.int64)


@triton.jit
def _wide(x):
    """To float32; bfloat16 by its bits, for which the compiler finds fewer instructions than for its conversion."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _rows(
    pointer, stride_h, stride_w, top, shift, column, c, height, width, channels, wide,
    COUNT: tl.constexpr, HAS_REGIONS: tl.constexpr,
):  # fmt: skip
    """COUNT rows from `top` of a tile of columns, moved by `shift`: tensors [columns, channels], zeros beyond the map."""
    moved = column + shift
    inside = (moved >= 0) & (moved < width)
    if HAS_REGIONS:
        inside = inside & (moved // wide == column // wide)
    at = pointer + (moved * stride_w)[:, None] + c[None, :]
    keep = inside[:, None] & (c < channels)[None, :]
    rows = ()
    for i in tl.static_range(COUNT):
        y = top + i
        row = tl.load(at + y * stride_h, mask=keep & ((y >= 0) & (y < height)), other=0.0)
        rows = rows + (row,)
    return rows


@triton.jit(do_not_specialize=_SIZES)
def _convolve_kernel(
    x, weight, bias, residual, out, x_b, x_h, x_w, r_b, r_h, r_w, height, width, channels, tall, wide, first, step,
    K: tl.constexpr, ALIGN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_REGIONS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Convolve a tile; `weight` is [K·K, C], its taps are read from number `first` in steps of `step`."""
    channels *= ALIGN
    c, column, top, b = _tile(tl.program_id(0), height, width, channels, ROWS, COLUMNS, CHANNELS)
    sums = ()
    for i in tl.static_range(ROWS):
        sums = sums + (tl.zeros([COLUMNS, CHANNELS], tl.float32),)
    for dx in range(K):
        rows = _rows(
            x + b * x_b * ALIGN, x_h * ALIGN, x_w * ALIGN, top - K // 2, dx - K // 2, column, c, height, width,
            channels, wide, ROWS + K - 1, HAS_REGIONS,
        )  # fmt: skip
        taps = ()
        for dy in tl.static_range(K):
            tap = weight + (first + step * (dy * K + dx)) * channels
            taps = taps + (tl.load(tap + c, mask=c < channels, other=0.0),)
        updated = ()
        for i in tl.static_range(ROWS):
            total = sums[i]
            for dy in tl.static_range(K):
                product = _wide(rows[i + dy]) * taps[dy][None, :]
                if HAS_REGIONS:
                    y = top + i
                    same = (y + (dy - K // 2)) // tall == y // tall
                    product = tl.where(same, product, 0.0)
                total += product
            updated = updated + (total,)
        sums = updated
    keep = (column < width)[:, None] & (c < channels)[None, :]
    at = (column * channels)[:, None] + c[None, :]
    out += b * height * width * channels
    for i in tl.static_range(ROWS):
        y = top + i
        keep_row = keep & (y < height)
        total = sums[i]
        if HAS_BIAS:
            total += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            place = residual + b * r_b * ALIGN + y * r_h * ALIGN
            total += tl.load(place + (column * (r_w * ALIGN))[:, None] + c[None, :], mask=keep_row, other=0.0).to(
                tl.float32
            )
        tl.store(out + y * width * channels + at, total.to(out.dtype.element_ty), mask=keep_row)


@triton.jit(do_not_specialize=_SIZES)
def _weight_grad_kernel(
    x, grad, parts, x_b, x_h, x_w, r_b, r_h, r_w, height, width, channels, tall, wide, tiles, splits,
    K: tl.constexpr, ALIGN: tl.constexpr, HAS_REGIONS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channels *= ALIGN
    across = tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0) % across
    split = tl.program_id(0) // across
    sums = ()
    for _ in tl.static_range(K * K + 1):
        sums = sums + (tl.zeros([COLUMNS, CHANNELS], tl.float32),)
    for tile in range(split, tiles, splits):
        c, column, top, b = _tile(tile * across + block, height, width, channels, ROWS, COLUMNS, CHANNELS)
        grads = _rows(
            grad + b * r_b * ALIGN,
            r_h * ALIGN,
            r_w * ALIGN,
            top,
            0,
            column,
            c,
            height,
            width,
            channels,
            wide,
            ROWS,
            False,
        )
        updated = ()
        for dx in tl.static_range(K):
            rows = _rows(
                x + b * x_b * ALIGN, x_h * ALIGN, x_w * ALIGN, top - K // 2, dx - K // 2, column, c, height, width,
                channels, wide, ROWS + K - 1, HAS_REGIONS,
            )  # fmt: skip
            for dy in tl.static_range(K):
                total = sums[dx * K + dy]
                for i in tl.static_range(ROWS):
                    product = _wide(rows[i + dy]) * _wide(grads[i])
                    if HAS_REGIONS:
                        y = top + i
                        same = (y + (dy - K // 2)) // tall == y // tall
                        product = tl.where(same, product, 0.0)
                    total += product
                updated = updated + (total,)
        total = sums[K * K]
        for i in tl.static_range(ROWS):
            total += _wide(grads[i])
        sums = updated + (total,)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    for dx in tl.static_range(K):
        for dy in tl.static_range(K):
            at = parts + (split * (K * K + 1) + dy * K + dx) * channels + c
            tl.store(at, tl.sum(sums[dx * K + dy], 0), mask=c < channels)
    tl.store(parts + (split * (K * K + 1) + K * K) * channels + c, tl.sum(sums[K * K], 0), mask=c < channels)
