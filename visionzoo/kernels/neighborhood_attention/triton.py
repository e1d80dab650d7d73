"""Triton kernels of neighborhood attention, forward and backward, with the gradient of the relative position bias.

Tokens that a dilation brings together form a map of their own, on which neighbors are adjacent; there a program
computes a tile of queries, for one head. It walks the rectangle of keys that the tile's windows cover together; keys
outside a query's own window are masked. The gradients of keys and values walk the rectangle of queries whose windows
can reach a tile of keys. Nothing is summed by atomics: results are the same from run to run.

With a stride the queries of a group share a window: a tile is a group, a part of one or several, so that it walks few
keys which some of its queries do not see.

Tiles have one size for each dtype, kernel and stride; batch and map are plain arguments, so that a new image size
compiles nothing new.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels import flops
from visionzoo.kernels.launch import blocks, dot_precision, head_block, run, token_rows
from visionzoo.kernels.online_softmax import LOG2_E, load_rows, softmax_end, softmax_start, softmax_step, store_rows
from visionzoo.kernels.operator import operator

_BLOCK = 32  # keys, or queries where a program has a tile of keys, of a step
_SIZES = ["height", "width", "batch", "splits"]  # vary from call to call: the compiler must not look at their values


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of [B, H, W, G, D] tensors as `neighborhood_attention` says."""
    return _attend(q, k, v, bias, list(kernel_size), list(dilation), list(stride), scale)[0]


# -- operators --------------------------------------------------------------------------------------------------------


def _attend_fake(q, k, v, bias, kernel_size, dilation, stride, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)


def _save(ctx, inputs, output):
    q, k, v, bias, *ctx.options = inputs
    ctx.save_for_backward(*output, q, k, v, bias)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 8
    bias_grad = ctx.needs_input_grad[3]
    *grads, grad_bias = _attend_backward(grad, *ctx.saved_tensors, *ctx.options, bias_grad)
    return *grads, grad_bias if bias_grad else None, None, None, None, None


@operator(
    "neighborhood_attention",
    fake=_attend_fake,
    save=_save,
    differentiate=_differentiate,
    flops=flops.neighborhood_attention,
)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    stride: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, W, G, D] and, for the backward pass, the base-2 logarithm of the softmax sums [B, H, W, G]."""
    call = _Call(q, k, v, bias, kernel_size, dilation, stride, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    call.launch(_forward_kernel, call.programs, out, lse)
    return out, lse


def _attend_backward_fake(grad, out, lse, q, k, v, bias, kernel_size, dilation, stride, scale, bias_grad):
    grad_bias = bias.new_empty(bias.shape) if bias_grad else q.new_empty(0)
    return *(q.new_empty(q.shape) for _ in range(3)), grad_bias


@operator(
    "neighborhood_attention_backward", fake=_attend_backward_fake, flops=flops.backward(flops.neighborhood_attention, 3)
)
def _attend_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    stride: list[int],
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias; the last is empty where it is not asked for."""
    call = _Call(q, k, v, bias, kernel_size, dilation, stride, scale)
    grad = grad.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    delta = torch.empty_like(lse)
    call.launch(_query_grad_kernel, call.programs, out, lse, grad, delta, grad_q)
    call.launch(_key_grad_kernel, call.programs, lse, grad, delta, grad_k, grad_v)
    grad_bias = q.new_empty(0)
    if bias_grad and bias is not None:
        batch, height, width, heads, _ = q.shape
        programs = max(1, call.programs // max(1, batch) * call.key_blocks)
        splits = min(batch, max(1, 1024 // programs))
        window = kernel_size[0] * kernel_size[1]
        parts = torch.empty((splits, heads, height * width, window), dtype=torch.float32, device=q.device)
        call.launch(_bias_grad_kernel, programs * splits, lse, grad, delta, parts, batch, splits)
        grad_bias = _by_offset(parts.sum(0), (height, width), kernel_size, dilation, stride).to(bias.dtype)
    return grad_q, grad_k, grad_v, grad_bias


def _by_offset(
    x: Tensor, size: tuple[int, int], kernel_size: list[int], dilation: list[int], stride: list[int]
) -> Tensor:
    """Sum [G, H·W, kh·kw], for each token its window row by row, by the window's offsets: [G, 2·kh - 1, 2·kw - 1]."""
    rows, columns = (_offsets(*axis, x.device) for axis in zip(size, kernel_size, dilation, stride, strict=True))
    x = x.double().unflatten(2, kernel_size).unflatten(1, size)  # [G, H, W, kh, kw]
    x = rows.flatten(0, 1).T @ x.transpose(2, 3).flatten(3).flatten(1, 2)  # [G, 2·kh - 1, W·kw]
    return x @ columns.flatten(0, 1)


def _offsets(length: int, kernel: int, dilation: int, stride: int, device: torch.device) -> Tensor:
    """Which offset each place of each token's window has along an axis, as float64 [length, kernel, 2·kernel - 1]."""
    token = torch.arange(length, device=device)
    position, group_length = token // dilation, (length - 1 - token % dilation) // dilation + 1
    leader = torch.minimum(position // stride * stride + stride // 2, group_length - 1)
    start = torch.minimum((leader - kernel // 2).clamp(min=0), group_length - kernel)
    offset = (start - position)[:, None] + torch.arange(kernel, device=device) + kernel - 1
    return (offset[..., None] == torch.arange(2 * kernel - 1, device=device)).double()


def _tokens(tall: int, wide: int) -> int:
    """Tokens of the block that a tile takes: the next power of two."""
    return max(16, 1 << (tall * wide - 1).bit_length())


@cache
def _strided_tile(kernel_size: tuple[int, int], stride: tuple[int, int], largest: int) -> tuple[int, int]:
    """Tile whose queries cause the least work each, of at most `largest` tokens: of whole groups where these fit.

    The work is that of the scores, those of padding too, and of the loads of keys, which count as more queries.
    """
    tiles = [(tall, wide) for tall in range(1, largest + 1) for wide in range(1, largest // tall + 1)]

    def work(sides: tuple[int, int]) -> float:
        keys = 1
        for side, kernel, shared in zip(sides, kernel_size, stride, strict=True):
            # from the first window of a tile to the last, on average over the tiles that begin at each token of a group
            span = sum(((tile + 1) * side - 1) // shared - tile * side // shared for tile in range(shared))
            keys *= span + kernel
        return blocks(keys, _BLOCK) * (_tokens(*sides) + 32) / (sides[0] * sides[1])

    return min(tiles, key=work)


class _Call:
    """One call's tensors and numbers, in the order in which every kernel takes them."""

    def __init__(self, q, k, v, bias, kernel_size, dilation, stride, scale):
        (q, q_step), (k, k_step), (v, v_step) = token_rows(q), token_rows(k), token_rows(v)
        batch, height, width, heads, head_dim = q.shape
        bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
        self.arguments = q, k, v, bias, q_step, k_step, v_step, height, width, scale
        # Sizes by trial on an H100 (bfloat16; kernel 7, width 32, 56² to 7²; kernel 13, width 64, 128²): 32 queries
        # against 32 keys. Wider windows want larger tiles, whose windows overlap more; exact float32 wants small ones.
        low_precision = q.dtype != torch.float32
        self.block, self.block_d = _BLOCK, head_block(head_dim)
        if max(stride) > 1:
            tall, wide = _strided_tile(tuple(kernel_size), tuple(stride), 128 if low_precision else 32)
        else:
            tall, wide = (8, 8) if max(kernel_size) > 7 and low_precision else (4, 8)
        self.tile = _tokens(tall, wide)
        self.warps = max(self.tile // 16, min(8, self.tile * self.block_d // (1024 if low_precision else 256)))
        self.options = {
            "G": heads,
            "D": head_dim,
            "BLOCK_D": self.block_d,
            "KERNEL_H": kernel_size[0],
            "KERNEL_W": kernel_size[1],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "TILE_H": tall,
            "TILE_W": wide,
            "TILE": self.tile,
            "PRECISION": dot_precision(q.dtype),
        }
        tiles = 1
        for length, step, tile in zip((height, width), dilation, (tall, wide), strict=True):
            tiles *= step * blocks(blocks(length, step), tile)
        self.programs = batch * tiles * heads
        keys = 1
        for kernel, shared, tile in zip(kernel_size, stride, (tall, wide), strict=True):
            keys *= blocks(tile - 1, shared) * shared + kernel
        self.key_blocks = blocks(keys, self.block)

    def launch(self, kernel, programs: int, *tensors) -> None:
        """Run a kernel with this call's arguments, then `tensors`."""
        keys = kernel is _key_grad_kernel
        run(
            kernel,
            programs,
            *self.arguments,
            *tensors,
            **self.options,
            BLOCK=self.tile if keys else self.block,
            num_warps=self.warps,
            num_stages=2 if keys else 3,
        )


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(
    program, height, width, G: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):  # fmt: skip
    """Head, first row and column, the dilation group's row and column and its height and width, and the sample."""
    across = tl.cdiv(tl.cdiv(width, DILATION_W), TILE_W)
    down = tl.cdiv(tl.cdiv(height, DILATION_H), TILE_H)
    g = program % G
    program = program // G
    x0 = program % across * TILE_W
    program = program // across
    group_x = program % DILATION_W
    program = program // DILATION_W
    y0 = program % down * TILE_H
    program = program // down
    group_y = program % DILATION_H
    b = (program // DILATION_H).to(tl.int64)
    rows = (height - group_y + DILATION_H - 1) // DILATION_H
    columns = (width - group_x + DILATION_W - 1) // DILATION_W
    return g, y0, x0, group_y, group_x, rows, columns, b


@triton.jit
def _places(y0, x0, rows, columns, TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE: tl.constexpr):
    """Rows and columns of a tile's tokens, and whether they exist: a block of the matrix units may have more."""
    m = tl.arange(0, TILE)
    y, x = y0 + m // TILE_W, x0 + m % TILE_W
    inside = (y < rows) & (x < columns)
    if TILE != TILE_H * TILE_W:
        inside = inside & (m < TILE_H * TILE_W)
    return y, x, inside


@triton.jit
def _window_start(position, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """First key of a query's window along an axis: centered on its group's leader, shifted inside at the borders."""
    if STRIDE > 1:
        position = tl.minimum(position // STRIDE * STRIDE + STRIDE // 2, length - 1)
    return tl.minimum(tl.maximum(position - KERNEL // 2, 0), length - KERNEL)


@triton.jit
def _keys_of_tile(first, length, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Along an axis the first of the keys that a tile of queries sees, and how many they are."""
    start = _window_start(first, length, KERNEL, STRIDE)
    return start, _window_start(tl.minimum(first + TILE, length) - 1, length, KERNEL, STRIDE) + KERNEL - start


@triton.jit
def _queries_of_tile(first, length, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Along an axis the first of the queries that see any of a tile of keys, and how many they are."""
    last = tl.minimum(first + TILE, length) - 1
    # leaders of the first and the last group; theirs are the windows that end and begin at the tile
    start, end = first - (KERNEL - 1) // 2, last + KERNEL // 2 + 1
    if STRIDE > 1:
        start = (start - STRIDE // 2 + STRIDE - 1) // STRIDE * STRIDE
        end = tl.minimum(((last + KERNEL // 2 - STRIDE // 2) // STRIDE + 1) * STRIDE, length)
    start = tl.where(first < KERNEL, 0, start)
    return start, tl.where(last >= length - KERNEL, length, end) - start


@triton.jit
def _scores(
    queries, keys, query_y, query_x, key_y, key_x, query_inside, key_inside, rows, columns, bias, scale,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [queries, keys] in base 2, with bias, and -inf outside of a query's window."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
    # one unsigned comparison an axis: what lies before the window is huge; so is a query or key that does not exist
    start_y = tl.where(query_inside, _window_start(query_y, rows, KERNEL_H, STRIDE_H), 1 << 20)
    start_x = _window_start(query_x, columns, KERNEL_W, STRIDE_W)
    key_y_or_none = tl.where(key_inside, key_y, -(1 << 20))
    keep = (key_y_or_none[None, :] - start_y[:, None]).to(tl.uint32) < KERNEL_H
    keep = keep & ((key_x[None, :] - start_x[:, None]).to(tl.uint32) < KERNEL_W)
    if bias is not None:
        at = ((key_y * (2 * KERNEL_W - 1) + key_x)[None, :] - (query_y * (2 * KERNEL_W - 1) + query_x)[:, None]) + (
            (KERNEL_H - 1) * (2 * KERNEL_W - 1) + KERNEL_W - 1
        )
        scores += tl.load(bias + at, mask=keep, other=0.0).to(tl.float32) * LOG2_E
    return tl.where(keep, scores, float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q, k, v, bias, q_step, k_step, v_step, height, width, scale, out, lse,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Online softmax of a tile of queries over the keys that their windows cover."""
    g, y0, x0, group_y, group_x, rows, columns, b = _tile(
        tl.program_id(0), height, width, G, DILATION_H, DILATION_W, TILE_H, TILE_W
    )
    first = b * (height * width) + group_y * width + group_x
    q += first * q_step + g * D
    k += first * k_step + g * D
    v += first * v_step + g * D
    out += (first * G + g) * D
    lse += first * G + g
    if bias is not None:
        bias += g * ((2 * KERNEL_H - 1) * (2 * KERNEL_W - 1))
    y, x, m_inside = _places(y0, x0, rows, columns, TILE_H, TILE_W, TILE)
    at = y * (DILATION_H * width) + x * DILATION_W
    queries = load_rows(q, at, q_step, m_inside, D, BLOCK_D)
    key_y0, key_rows = _keys_of_tile(y0, rows, TILE_H, KERNEL_H, STRIDE_H)
    key_x0, key_columns = _keys_of_tile(x0, columns, TILE_W, KERNEL_W, STRIDE_W)
    highest, total, accumulated = softmax_start(TILE, BLOCK_D)
    for start in range(0, key_rows * key_columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < key_rows * key_columns
        key_y, key_x = key_y0 + j // key_columns, key_x0 + j % key_columns
        key_at = key_y * (DILATION_H * width) + key_x * DILATION_W
        keys = load_rows(k, key_at, k_step, inside, D, BLOCK_D)
        values = load_rows(v, key_at, v_step, inside, D, BLOCK_D)
        scores = _scores(
            queries, keys, y, x, key_y, key_x, m_inside, inside, rows, columns, bias, scale, KERNEL_H, KERNEL_W,
            STRIDE_H, STRIDE_W, PRECISION,
        )  # fmt: skip
        p, highest, total, accumulated = softmax_step(scores, highest, total, accumulated)
        accumulated += tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    outputs, logarithm = softmax_end(highest, total, accumulated)
    store_rows(out, at, G * D, outputs, m_inside, D, BLOCK_D)
    tl.store(lse + at * G, logarithm, mask=m_inside)


@triton.jit(do_not_specialize=_SIZES)
def _query_grad_kernel(
    q, k, v, bias, q_step, k_step, v_step, height, width, scale, out, lse, grad, delta, grad_q,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and `delta`, the product of output and its gradient, for the other kernels."""
    g, y0, x0, group_y, group_x, rows, columns, b = _tile(
        tl.program_id(0), height, width, G, DILATION_H, DILATION_W, TILE_H, TILE_W
    )
    first = b * (height * width) + group_y * width + group_x
    q += first * q_step + g * D
    k += first * k_step + g * D
    v += first * v_step + g * D
    out += (first * G + g) * D
    grad += (first * G + g) * D
    grad_q += (first * G + g) * D
    lse += first * G + g
    delta += first * G + g
    if bias is not None:
        bias += g * ((2 * KERNEL_H - 1) * (2 * KERNEL_W - 1))
    y, x, m_inside = _places(y0, x0, rows, columns, TILE_H, TILE_W, TILE)
    at = y * (DILATION_H * width) + x * DILATION_W
    queries = load_rows(q, at, q_step, m_inside, D, BLOCK_D)
    grads = load_rows(grad, at, G * D, m_inside, D, BLOCK_D)
    outs = load_rows(out, at, G * D, m_inside, D, BLOCK_D)
    logarithm = tl.load(lse + at * G, mask=m_inside, other=float("inf"))
    product = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + at * G, product, mask=m_inside)
    key_y0, key_rows = _keys_of_tile(y0, rows, TILE_H, KERNEL_H, STRIDE_H)
    key_x0, key_columns = _keys_of_tile(x0, columns, TILE_W, KERNEL_W, STRIDE_W)
    accumulated = tl.zeros([TILE, BLOCK_D], tl.float32)
    for start in range(0, key_rows * key_columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < key_rows * key_columns
        key_y, key_x = key_y0 + j // key_columns, key_x0 + j % key_columns
        key_at = key_y * (DILATION_H * width) + key_x * DILATION_W
        keys = load_rows(k, key_at, k_step, inside, D, BLOCK_D)
        values = load_rows(v, key_at, v_step, inside, D, BLOCK_D)
        scores = _scores(
            queries, keys, y, x, key_y, key_x, m_inside, inside, rows, columns, bias, scale, KERNEL_H, KERNEL_W,
            STRIDE_H, STRIDE_W, PRECISION,
        )  # fmt: skip
        grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        grad_scores = tl.exp2(scores - logarithm[:, None]) * (grad_p - product[:, None])
        accumulated += tl.dot(grad_scores.to(keys.dtype), keys, input_precision=PRECISION)
    store_rows(grad_q, at, G * D, accumulated * scale, m_inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _key_grad_kernel(
    q, k, v, bias, q_step, k_step, v_step, height, width, scale, lse, grad, delta, grad_k, grad_v,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over the queries whose windows reach it."""
    g, y0, x0, group_y, group_x, rows, columns, b = _tile(
        tl.program_id(0), height, width, G, DILATION_H, DILATION_W, TILE_H, TILE_W
    )
    first = b * (height * width) + group_y * width + group_x
    q += first * q_step + g * D
    k += first * k_step + g * D
    v += first * v_step + g * D
    grad += (first * G + g) * D
    grad_k += (first * G + g) * D
    grad_v += (first * G + g) * D
    lse += first * G + g
    delta += first * G + g
    if bias is not None:
        bias += g * ((2 * KERNEL_H - 1) * (2 * KERNEL_W - 1))
    key_y, key_x, inside = _places(y0, x0, rows, columns, TILE_H, TILE_W, TILE)
    key_at = key_y * (DILATION_H * width) + key_x * DILATION_W
    keys = load_rows(k, key_at, k_step, inside, D, BLOCK_D)
    values = load_rows(v, key_at, v_step, inside, D, BLOCK_D)
    query_y0, query_rows = _queries_of_tile(y0, rows, TILE_H, KERNEL_H, STRIDE_H)
    query_x0, query_columns = _queries_of_tile(x0, columns, TILE_W, KERNEL_W, STRIDE_W)
    accumulated_k = tl.zeros([TILE, BLOCK_D], tl.float32)
    accumulated_v = tl.zeros([TILE, BLOCK_D], tl.float32)
    for start in range(0, query_rows * query_columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        m_inside = i < query_rows * query_columns
        y, x = query_y0 + i // query_columns, query_x0 + i % query_columns
        at = y * (DILATION_H * width) + x * DILATION_W
        queries = load_rows(q, at, q_step, m_inside, D, BLOCK_D)
        grads = load_rows(grad, at, G * D, m_inside, D, BLOCK_D)
        logarithm = tl.load(lse + at * G, mask=m_inside, other=float("inf"))
        product = tl.load(delta + at * G, mask=m_inside, other=0.0)
        scores = _scores(
            queries, keys, y, x, key_y, key_x, m_inside, inside, rows, columns, bias, scale, KERNEL_H, KERNEL_W,
            STRIDE_H, STRIDE_W, PRECISION,
        )  # fmt: skip
        grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        p = tl.exp2(scores - logarithm[:, None])
        grad_scores = p * (grad_p - product[:, None])
        accumulated_v += tl.dot(tl.trans(p.to(grads.dtype)), grads, input_precision=PRECISION)
        accumulated_k += tl.dot(tl.trans(grad_scores.to(queries.dtype)), queries, input_precision=PRECISION)
    store_rows(grad_k, key_at, G * D, accumulated_k * scale, inside, D, BLOCK_D)
    store_rows(grad_v, key_at, G * D, accumulated_v, inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _bias_grad_kernel(
    q, k, v, bias, q_step, k_step, v_step, height, width, scale, lse, grad, delta, parts, batch, splits,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of a tile's gradients of scores over every `splits`-th sample, for each query its window row by row."""
    key_rows_most = tl.cdiv(TILE_H - 1, STRIDE_H) * STRIDE_H + KERNEL_H
    key_blocks = tl.cdiv(key_rows_most * (tl.cdiv(TILE_W - 1, STRIDE_W) * STRIDE_W + KERNEL_W), BLOCK)
    program = tl.program_id(0)
    split = program % splits
    block = program // splits % key_blocks
    # the "sample" that follows from the rest of the program's number is 0
    g, y0, x0, group_y, group_x, rows, columns, none = _tile(
        program // (splits * key_blocks), height, width, G, DILATION_H, DILATION_W, TILE_H, TILE_W
    )
    if bias is not None:
        bias += g * ((2 * KERNEL_H - 1) * (2 * KERNEL_W - 1))
    y, x, m_inside = _places(y0, x0, rows, columns, TILE_H, TILE_W, TILE)
    at = y * (DILATION_H * width) + x * DILATION_W
    key_y0, key_rows = _keys_of_tile(y0, rows, TILE_H, KERNEL_H, STRIDE_H)
    key_x0, key_columns = _keys_of_tile(x0, columns, TILE_W, KERNEL_W, STRIDE_W)
    j = block * BLOCK + tl.arange(0, BLOCK)
    inside = j < key_rows * key_columns
    key_y, key_x = key_y0 + j // key_columns, key_x0 + j % key_columns
    key_at = key_y * (DILATION_H * width) + key_x * DILATION_W
    accumulated = tl.zeros([TILE, BLOCK], tl.float32)
    for sample in range(split, batch, splits):
        first = (none + sample) * (height * width) + group_y * width + group_x
        queries = load_rows(q + first * q_step + g * D, at, q_step, m_inside, D, BLOCK_D)
        grads = load_rows(grad + (first * G + g) * D, at, G * D, m_inside, D, BLOCK_D)
        logarithm = tl.load(lse + first * G + g + at * G, mask=m_inside, other=float("inf"))
        product = tl.load(delta + first * G + g + at * G, mask=m_inside, other=0.0)
        keys = load_rows(k + first * k_step + g * D, key_at, k_step, inside, D, BLOCK_D)
        values = load_rows(v + first * v_step + g * D, key_at, v_step, inside, D, BLOCK_D)
        scores = _scores(
            queries, keys, y, x, key_y, key_x, m_inside, inside, rows, columns, bias, scale, KERNEL_H, KERNEL_W,
            STRIDE_H, STRIDE_W, PRECISION,
        )  # fmt: skip
        grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        accumulated += tl.exp2(scores - logarithm[:, None]) * (grad_p - product[:, None])
    window_y = key_y[None, :] - _window_start(y, rows, KERNEL_H, STRIDE_H)[:, None]
    window_x = key_x[None, :] - _window_start(x, columns, KERNEL_W, STRIDE_W)[:, None]
    seen = (window_y >= 0) & (window_y < KERNEL_H) & (window_x >= 0) & (window_x < KERNEL_W)
    seen = seen & m_inside[:, None] & inside[None, :]
    token = group_y * width + group_x + at
    row = ((none + split * G + g) * (height * width) + token) * (KERNEL_H * KERNEL_W)  # in 64 bits, as samples are
    tl.store(parts + row[:, None] + window_y * KERNEL_W + window_x, accumulated, mask=seen)
