"""Triton kernels of the depthwise convolution, forward and backward; maps are read where they lie, never copied.

A program computes a tile of rows, columns and channels. For each column of the convolution's kernel it reads the rows
that the tile needs, each once, and adds their products to the sums of all rows of the tile, which stay in registers;
what it reads again for the next column comes from the first-level cache. The gradient of the input is the convolution
of the output's gradient with the kernel turned around. The gradients of weight and bias are summed over the tiles of
a program, then over programs, always in the same order: results are the same from run to run.

Products and sums are float32. Batch, map and channels are plain arguments, so that a new size compiles nothing new.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels import flops
from visionzoo.kernels.launch import blocks, run, token_rows
from visionzoo.kernels.operator import operator
from visionzoo.kernels.precision import autocast_dtype

# programs that sum the gradient of weight: enough to fill a GPU, few enough that adding up their sums costs little
_WEIGHT_PROGRAMS = 1024
_BY_TILES = 5  # sides of kernels up to which they are summed by tiles: faster there, and slow to compile above
_TALL = 4  # rows of such tiles
_SMALL = 2**20  # numbers of maps up to which taps are read as they lie, which saves a launch
# arguments that vary with model and image: the compiler must not look at their values
_SIZES = [
    "x_step",
    "other_step",
    "height",
    "width",
    "channels",
    "tall",
    "wide",
    "first",
    "direction",
    "biased",
    "tap_step",
    "stretch",
    "tiles",
    "splits",
]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None, regions: tuple[int, int] | None
) -> Tensor:
    """Convolution of [B, H, W, C] as `depthwise_conv` says."""
    dtype = autocast_dtype(x.device) or x.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    add_x = residual is x  # the gradients of both uses of x are then computed as one
    return _convolve(x, weight, bias, None if add_x else residual, add_x, list(regions or ()), dtype)


# -- operators --------------------------------------------------------------------------------------------------------


def _convolve_fake(x, weight, bias, residual, add_x, regions, dtype):
    return x.new_empty(x.shape, dtype=dtype)


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


@operator("depthwise_conv", fake=_convolve_fake, save=_save, differentiate=_differentiate, flops=flops.depthwise_conv)
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
    return _run(x, weight, bias, x if add_x else residual, regions, dtype)


def _convolve_backward_fake(grad, x, weight, add_x, regions, x_grad, weight_grad):
    return (
        x.new_empty(x.shape if x_grad else 0),
        weight.new_empty(weight.shape if weight_grad else 0),
        x.new_empty(x.shape[3] if weight_grad else 0, dtype=torch.float32),
    )


@operator("depthwise_conv_backward", fake=_convolve_backward_fake, flops=flops.depthwise_conv_backward)
def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, add_x: bool, regions: list[int], x_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of weight and, in float32, of bias; empty where they are not asked for."""
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    grad_bias = x.new_empty(0, dtype=torch.float32)
    if x_grad:
        grad_x = _run(grad, weight, None, grad if add_x else None, regions, x.dtype, turned=True)
    if weight_grad:
        grad_weight, grad_bias = _run_weight_grad(x, grad, weight, regions)
    return grad_x, grad_weight, grad_bias


# -- launches ---------------------------------------------------------------------------------------------------------


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    regions: list[int],
    dtype: torch.dtype,
    turned: bool = False,
) -> Tensor:
    """Convolution of x in `dtype`, with the kernel turned around if so, plus bias and residual."""
    batch, height, width, channels = x.shape
    kernel = weight.shape[-1]
    taps, tap_step, channel_step = weight.contiguous(), 1, kernel * kernel
    if x.numel() > _SMALL:  # the channels of a tap side by side: pays where many programs read them
        taps = torch.empty((kernel * kernel, channels), dtype=torch.float32, device=x.device)
        taps.copy_(weight.reshape(channels, -1).t())
        tap_step, channel_step = channels, 1
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, x_step = token_rows(x)
    if residual is x:
        residual, residual_step = rows, x_step
    else:
        residual, residual_step = (None, 0) if residual is None else token_rows(residual)
    align = math.gcd(8, channels, x_step, residual_step)
    tall, columns, block, warps = _tile_size(channels)
    programs = batch * blocks(height, tall) * blocks(width, columns) * blocks(channels, block)
    run(
        _convolve_kernel, programs,
        rows, taps, weight if bias is None else bias, residual, out, x_step // align, residual_step // align, height,
        width, channels // align,
        *_region_size(x, regions), *((kernel * kernel - 1, -1) if turned else (0, 1)), int(bias is not None),
        tap_step, channel_step,
        K=kernel, ALIGN=align, ROWS=tall, COLUMNS=columns, CHANNELS=block, num_warps=warps,
    )  # fmt: skip
    return out


def _run_weight_grad(x: Tensor, grad: Tensor, weight: Tensor, regions: list[int]) -> tuple[Tensor, Tensor]:
    """Gradients of weight, and of bias in float32."""
    batch, height, width, channels = x.shape
    kernel = weight.shape[-1]
    (rows, x_step), (grads, grad_step) = token_rows(x), token_rows(grad)
    align = math.gcd(8, channels, x_step, grad_step)
    by_tiles = kernel <= _BY_TILES
    side, columns, block, warps = _weight_grad_size(kernel, channels)
    across = blocks(channels, block) * (1 if by_tiles else blocks(kernel, side))
    programs = max(1, _WEIGHT_PROGRAMS // across)
    tall = _TALL if by_tiles else _stretch(height, programs, batch * blocks(width, columns))
    tiles = batch * blocks(height, tall) * blocks(width, columns)
    splits = min(tiles, programs)
    parts = torch.empty((splits, kernel * kernel + 1, channels), dtype=torch.float32, device=x.device)
    shapes = (x_step // align, grad_step // align, height, width, channels // align, *_region_size(x, regions))
    constants = {"K": kernel, "ALIGN": align, "COLUMNS": columns, "CHANNELS": block, "num_warps": warps}
    if by_tiles:
        run(
            _tile_weight_grad_kernel,
            splits * across,
            rows,
            grads,
            parts,
            *shapes,
            tiles,
            splits,
            ROWS=tall,
            **constants,
        )
    else:
        run(
            _row_weight_grad_kernel, splits * across, rows, grads, parts, *shapes, tall, tiles, splits,
            SIDE=side, **constants,
        )  # fmt: skip
    sums = parts.sum(0)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_weight.view(channels, -1).copy_(sums[:-1].t())
    return grad_weight, sums[-1].clone()  # outputs of an operator may not share memory


def _tile_size(channels: int) -> tuple[int, int, int, int]:
    """Rows, columns and channels of a tile, and its warps: a thread has 8 channels of one column.

    By trial on an H100 (bfloat16, batch 128, 56² to 14², kernels 3 and 5).
    """
    block = _channel_block(channels)
    return 8, 8, block, block // 32


def _weight_grad_size(kernel: int, channels: int) -> tuple[int, int, int, int]:
    """Columns of the kernel that a program sums row by row, columns and channels of its tile, and its warps.

    A program has few columns of large kernels, for the compiler takes long over many sums; a thread has as many
    channels as let it keep these in registers. By tiles it sums all columns.
    """
    block = _channel_block(channels)
    side = 4 if kernel == 7 else min(kernel, 3)
    numbers = 4 if kernel <= 3 else 2
    return side, 8, block, 8 * block // 32 // numbers


def _stretch(height: int, programs: int, across: int) -> int:
    """Rows of a tile: up to 16, for each costs k - 1 rows more, but few where there would be too few tiles.

    Args:
        height: of the map.
        programs: that there should be.
        across: tiles side by side in all samples.
    """
    rows = 16
    while rows > 4 and across * blocks(height, rows) < programs:
        rows //= 2
    return rows


def _channel_block(channels: int) -> int:
    """Channels of a tile: 64, or 32 where that wastes less."""
    return 64 if -channels % 64 < 32 else 32


def _region_size(x: Tensor, regions: list[int]) -> tuple[int | None, int | None]:
    return (x.shape[1] // regions[0], x.shape[2] // regions[1]) if regions else (None, None)


# -- kernels ----------------------------------------------------------------------------------------------------------
# Steps from token to token and channels come in units of ALIGN, so that the compiler knows what divides them.


@triton.jit
def _place(program, height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sample, first row, columns and channels of a tile; the tiles of one place lie side by side."""
    across = tl.cdiv(channels, CHANNELS)
    c = program % across * CHANNELS + tl.arange(0, CHANNELS)
    program //= across
    across = tl.cdiv(width, COLUMNS)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    program //= across
    across = tl.cdiv(height, ROWS)
    return (program // across).to(tl.int64), program % across * ROWS, column, c


@triton.jit
def _zeros(COUNT: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """COUNT tensors of zeros."""
    zeros: tl.tuple = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([COLUMNS, CHANNELS], tl.float32),)
    return zeros


@triton.jit
def _load_rows(pointer, step, top, column, shift, c, height, width, channels, wide, COUNT: tl.constexpr):
    """COUNT rows of a sample from `top`, [columns, channels] each, at columns moved by `shift`; zeros off the map."""
    moved = column + shift
    inside = (moved >= 0) & (moved < width)
    if wide is not None:
        inside = inside & (moved // wide == column // wide)
    keep = inside[:, None] & (c < channels)[None, :]
    at = pointer + (moved * step)[:, None] + c[None, :]
    rows: tl.tuple = ()
    for i in tl.static_range(COUNT):
        y = top + i
        row = tl.load(at + y * (width * step), mask=keep & ((y >= 0) & (y < height)), other=0.0)
        rows = rows + (row,)
    return rows


@triton.jit
def _wide(x):
    """To float32; bfloat16 by its bits, which takes a third fewer instructions than the compiler's own way."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _same_region(products, y, other_y, tall):
    """Products of rows y and other_y, or zeros where these lie in different regions."""
    if tall is not None:
        products = tl.where(y // tall == other_y // tall, products, 0.0)
    return products


@triton.jit(do_not_specialize=_SIZES)
def _convolve_kernel(
    x, taps, bias, residual, out, x_step, other_step, height, width, channels, tall, wide, first, direction, biased,
    tap_step, channel_step,
    K: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Convolve a tile; the K·K taps are read from number `first` on, forwards or backwards.

    Without bias `biased` is 0 and `bias` is never read: one kernel serves both passes, whose compilation takes long.
    """
    channels *= ALIGN
    x_step *= ALIGN
    b, top, column, c = _place(tl.program_id(0), height, width, channels, ROWS, COLUMNS, CHANNELS)
    c_inside = c < channels
    x += b * (height * width) * x_step
    sums = _zeros(ROWS, COLUMNS, CHANNELS)
    for dx in range(K):
        rows = _load_rows(
            x, x_step, top - K // 2, column, dx - K // 2, c, height, width, channels, wide, ROWS + K - 1
        )  # fmt: skip
        column_taps: tl.tuple = ()
        for dy in tl.static_range(K):
            at = taps + (first + direction * (dy * K + dx)) * tap_step + c * channel_step
            column_taps = column_taps + (tl.load(at, mask=c_inside, other=0.0).to(tl.float32),)
        updated: tl.tuple = ()
        for i in tl.static_range(ROWS):
            total = sums[i]
            for dy in tl.static_range(K):
                products = _wide(rows[i + dy]) * column_taps[dy][None, :]
                total += _same_region(products, top + i, top + i + dy - K // 2, tall)
            updated = updated + (total,)
        sums = updated
    inside = (column < width)[:, None] & c_inside[None, :]
    out += b * (height * width) * channels
    if residual is not None:
        other_step *= ALIGN
        residual += b * (height * width) * other_step
    constant = tl.load(bias + c, mask=c_inside & (biased != 0), other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        y = top + i
        token = y * width + column
        keep = inside & (y < height)
        total = sums[i] + constant[None, :]
        if residual is not None:
            total += _wide(tl.load(residual + (token * other_step)[:, None] + c[None, :], mask=keep, other=0.0))
        tl.store(out + (token * channels)[:, None] + c[None, :], total.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=_SIZES)
def _tile_weight_grad_kernel(
    x, grad, parts, x_step, other_step, height, width, channels, tall, wide, tiles, splits,
    K: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of taps and bias over every `splits`-th tile of ROWS rows: [K·K + 1, C] of `parts`."""
    channels *= ALIGN
    x_step *= ALIGN
    other_step *= ALIGN
    across = tl.cdiv(channels, CHANNELS)
    split, block = tl.program_id(0) // across, tl.program_id(0) % across
    sums = _zeros(K * K + 1, COLUMNS, CHANNELS)
    for tile in range(split, tiles, splits):
        b, top, column, c = _place(tile * across + block, height, width, channels, ROWS, COLUMNS, CHANNELS)
        first = b * (height * width)
        grads = _load_rows(
            grad + first * other_step, other_step, top, column, 0, c, height, width, channels, None, ROWS
        )  # fmt: skip
        updated: tl.tuple = ()
        for dx in tl.static_range(K):
            rows = _load_rows(
                x + first * x_step, x_step, top - K // 2, column, dx - K // 2, c, height, width, channels, wide,
                ROWS + K - 1,
            )  # fmt: skip
            for dy in tl.static_range(K):
                total = sums[dx * K + dy]
                for i in tl.static_range(ROWS):
                    products = _wide(rows[i + dy]) * _wide(grads[i])
                    total += _same_region(products, top + i, top + i + dy - K // 2, tall)
                updated = updated + (total,)
        total = sums[K * K]
        for i in tl.static_range(ROWS):
            total += _wide(grads[i])
        sums = updated + (total,)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    parts += split * (K * K + 1) * channels + c
    for dx in tl.static_range(K):
        for dy in tl.static_range(K):
            tl.store(parts + (dy * K + dx) * channels, tl.sum(sums[dx * K + dy], 0), mask=c < channels)
    tl.store(parts + K * K * channels, tl.sum(sums[K * K], 0), mask=c < channels)


@triton.jit
def _load_step(
    x, grad, x_step, other_step, n, top, column, c, height, width, channels, wide, stretch, left,
    K: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Row `n` of those that a stretch meets, once for each column of the kernel from `left`, and its own row `n`."""
    y = top - K // 2 + n
    rows: tl.tuple = ()
    for dx in tl.static_range(SIDE):
        row = _load_rows(x, x_step, y, column, left + dx, c, height, width, channels, wide, 1)
        rows = rows + (row[0],)
    y = tl.where(n < stretch, top + n, height)  # rows of the next stretch are not this one's
    own = _load_rows(grad, other_step, y, column, 0, c, height, width, channels, None, 1)
    return rows, own[0]


@triton.jit(do_not_specialize=_SIZES)
def _row_weight_grad_kernel(
    x, grad, parts, x_step, other_step, height, width, channels, tall, wide, stretch, tiles, splits,
    K: tl.constexpr, SIDE: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of SIDE columns of taps, and of bias, over every `splits`-th tile of `stretch` rows.

    Row by row: a row of x meets the last K rows of the output's gradient, which stay in registers; the next row is on
    its way meanwhile. Sums are [K·K + 1, C] of `parts`.
    """
    channels *= ALIGN
    x_step *= ALIGN
    other_step *= ALIGN
    across, groups = tl.cdiv(channels, CHANNELS), tl.cdiv(K, SIDE)
    group, program = tl.program_id(0) % groups, tl.program_id(0) // groups
    split, block = program // across, program % across
    left = group * SIDE - K // 2
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    sums = _zeros(SIDE * K, COLUMNS, CHANNELS)
    bias_sum = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    for tile in range(split, tiles, splits):
        column = tile % tl.cdiv(width, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
        place = tile // tl.cdiv(width, COLUMNS)
        top = place % tl.cdiv(height, stretch) * stretch
        first = (place // tl.cdiv(height, stretch)).to(tl.int64) * (height * width)
        own_x, own_grad = x + first * x_step, grad + first * other_step
        window = _zeros(K, COLUMNS, CHANNELS)
        rows, new = _load_step(
            own_x, own_grad, x_step, other_step, 0, top, column, c, height, width, channels, wide, stretch,
            left, K, SIDE,
        )  # fmt: skip
        for n in range(stretch + K - 1):
            next_rows, next_new = _load_step(
                own_x, own_grad, x_step, other_step, n + 1, top, column, c, height, width, channels, wide, stretch,
                left, K, SIDE,
            )  # fmt: skip
            bias_sum += _wide(new)
            moved: tl.tuple = (_wide(new),)
            for dy in tl.static_range(K - 1):
                moved = moved + (window[dy],)
            window = moved
            updated: tl.tuple = ()
            for dx in tl.static_range(SIDE):
                values = _wide(rows[dx])
                for dy in tl.static_range(K):
                    products = _same_region(values * window[dy], top - K // 2 + n, top + n - dy, tall)
                    updated = updated + (sums[dx * K + dy] + products,)
            sums = updated
            rows, new = next_rows, next_new
    parts += split * (K * K + 1) * channels + c
    for dx in tl.static_range(SIDE):
        at = group * SIDE + dx  # of the kernel's columns
        for dy in tl.static_range(K):
            keep = (c < channels) & (at < K)
            tl.store(parts + (dy * K + at) * channels, tl.sum(sums[dx * K + dy], 0), mask=keep)
    tl.store(parts + K * K * channels, tl.sum(bias_sum, 0), mask=(c < channels) & (group == 0))
