"""Triton kernels of halo attention, forward and backward; windows are read where they lie, rims never copied.

A program computes queries of one block, for one head, over the keys of the window as one flat list: key c of the list
lies in row c div window and column c mod window. Its queries' position terms, one for each row and each column of the
window, are a matrix product with the embeddings, of which every query then gathers the entries that belong to its
place in the block. Terms reach the scores through a product with a matrix of zeros and ones that says in which row and
column a key lies, and the gradient of the scores reaches the terms through its transpose.

The gradients of keys and values belong to a square tile of the map, small since a tile is met by few blocks then: it
walks the queries of all blocks whose windows meet it. Nothing is summed by atomics: results are the same from run to
run. Block, rim and stride are constants of a kernel, for they are constants of a model; batch and map are plain
arguments, so that a new image size compiles nothing new.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels import flops
from visionzoo.kernels.launch import block_size as rows_block
from visionzoo.kernels.launch import blocks, check_numbers, dot_precision, head_block, head_rows, run
from visionzoo.kernels.online_softmax import (
    LOG2_E,
    load_rows,
    program_place,
    softmax_end,
    softmax_start,
    softmax_step,
    store_rows,
)
from visionzoo.kernels.operator import operator

_SIZES = ["height", "width", "programs"]  # vary with batch and image: the compiler must not look at their values
_TILE = 4  # side of the tiles of keys
_GROUPS = 1024  # programs that sum the gradient of the embeddings in registers: enough for any GPU


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    *,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
    mask_padding: bool,
) -> Tensor:
    """Attention of [B, H, W, G, D] tensors as `halo_attention` says."""
    return _attend(q, k, v, rel_height, rel_width, block_size, halo_size, stride, scale, mask_padding)[0]


# -- operators --------------------------------------------------------------------------------------------------------


def _attend_fake(q, k, v, rel_height, rel_width, block_size, halo_size, stride, scale, mask_padding):
    return q.new_empty((*q.shape[:4], v.shape[4])), q.new_empty(q.shape[:4], dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 10
    *grads, grad_rel = _attend_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, *grad_rel.unbind(), None, None, None, None, None


@operator("halo_attention", fake=_attend_fake, save=_save, differentiate=_differentiate, flops=flops.halo_attention)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
    mask_padding: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, h, w, G, V] and, for the backward pass, the base-2 logarithm of the softmax sums [B, h, w, G]."""
    call = _Call(q, k, v, rel_height, rel_width, block_size, halo_size, stride, scale, mask_padding)
    out = torch.empty((*q.shape[:4], v.shape[4]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    call.launch(_forward_kernel, call.query_programs, out, lse)
    return out, lse


def _attend_backward_fake(
    grad, out, lse, q, k, v, rel_height, rel_width, block_size, halo_size, stride, scale, mask_padding
):
    return *(t.new_empty(t.shape) for t in (q, k, v)), rel_height.new_empty((2, *rel_height.shape))


@operator("halo_attention_backward", fake=_attend_backward_fake, flops=flops.backward(flops.halo_attention, 3))
def _attend_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
    mask_padding: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, one behind the other, of rel_height and rel_width."""
    call = _Call(q, k, v, rel_height, rel_width, block_size, halo_size, stride, scale, mask_padding)
    grad = grad.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    terms = torch.empty((*q.shape[:4], 2 * call.window), dtype=q.dtype, device=q.device)
    groups = min(call.query_programs, _GROUPS)
    parts = torch.empty((groups, 2, *rel_height.shape), dtype=torch.float32, device=q.device)
    call.launch(_query_grad_kernel, groups, out, lse, grad, delta, terms, grad_q, parts, call.query_programs)
    call.launch(_key_grad_kernel, call.key_programs, lse, grad, delta, terms, grad_k, grad_v)
    return grad_q, grad_k, grad_v, parts.sum(0).to(rel_height.dtype)


class _Call:
    """One call's tensors and numbers, in the order in which every kernel takes them."""

    def __init__(self, q, k, v, rel_height, rel_width, block_size, halo_size, stride, scale, mask_padding):
        (q, *q_steps), (k, *k_steps), (v, *v_steps) = head_rows(q), head_rows(k), head_rows(v)
        batch, height, width, heads, head_dim = k.shape
        value_dim = v.shape[4]
        self.window, self.dtype = block_size + 2 * halo_size, q.dtype
        check_numbers("of a sample's position terms", q.shape[1] * q.shape[2] * heads * 2 * self.window)
        self.arguments = (
            q, k, v, rel_height.contiguous(), rel_width.contiguous(), *q_steps, *k_steps, *v_steps, height, width, scale
        )  # fmt: skip
        queries = (block_size // stride) ** 2
        self.widest = max(head_block(head_dim), head_block(value_dim))
        self.block = rows_block(queries, q.dtype)  # of queries of one block
        if self.widest > 64 and self.block > 16:
            self.block //= 2
        self.options = {
            "G": heads,
            "D": head_dim,
            "V": value_dim,
            "BLOCK_D": head_block(head_dim),
            "BLOCK_V": head_block(value_dim),
            "BLOCK": block_size,
            "HALO": halo_size,
            "STRIDE": stride,
            "MASK": mask_padding,
            "PRECISION": dot_precision(q.dtype),
        }
        count = blocks(height, block_size) * blocks(width, block_size)
        self.query_programs = batch * count * blocks(queries, self.block) * heads
        self.key_programs = batch * blocks(height, _TILE) * blocks(width, _TILE) * heads

    def launch(self, kernel, programs: int, *tensors) -> None:
        """Run a kernel with this call's arguments, then `tensors`.

        Sizes by registers: windows up to 18 and heads up to 64 wide spill few or none, in 16 and in 32 bits.
        """
        if kernel is _key_grad_kernel:
            sizes = {"BLOCK_M": rows_block(64, self.dtype), "TILE": _TILE, "num_warps": 2 if self.widest <= 64 else 4}
        else:
            sizes = {
                "BLOCK_M": self.block,
                "BLOCK_N": 32,
                "BLOCK_R": head_block(2 * (2 * self.window - 1)),
                "BLOCK_P": head_block(2 * self.window),
                "num_warps": (2 if self.block == 16 else 4) * (1 if kernel is _forward_kernel else 2),
            }
        run(kernel, programs, *self.arguments, *tensors, **self.options, **sizes, num_stages=2)


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _queries(block, m, columns, height, width, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """Row and column in the block of its queries m, their numbers on the map of queries, and which of them exist."""
    side: tl.constexpr = BLOCK // STRIDE
    inside = m < side * side
    m = tl.minimum(m, side * side - 1)
    i, j = m // side, m % side
    y, x = block // columns * side + i, block % columns * side + j
    return i, j, y * width + x, inside & (y < height) & (x < width)


@triton.jit
def _window_keys(block, c, columns, height, width, BLOCK: tl.constexpr, HALO: tl.constexpr):
    """Numbers on the map of keys c of the block's window, and which of them are on the map."""
    window: tl.constexpr = BLOCK + 2 * HALO
    y = block // columns * BLOCK - HALO + c // window
    x = block % columns * BLOCK - HALO + c % window
    return y * width + x, (c < window * window) & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _embeddings(
    rel_height, rel_width, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_R, BLOCK_D]: the rows of the vertical table, then those of the horizontal one, then zeros."""
    rows: tl.constexpr = 2 * WINDOW - 1
    r = tl.arange(0, BLOCK_R)
    vertical = load_rows(rel_height, r, D, r < rows, D, BLOCK_D)
    return vertical + load_rows(rel_width, r - rows, D, (r >= rows) & (r < 2 * rows), D, BLOCK_D)


@triton.jit
def _position_terms(queries, embeddings, i, j, WINDOW: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr):
    """Terms [queries, BLOCK_P], in base 2, of the window's rows, then of its columns, then zeros."""
    products = tl.dot(queries, tl.trans(embeddings), input_precision=PRECISION) * LOG2_E
    p = tl.arange(0, BLOCK_P)[None, :]
    row = tl.where(p < WINDOW, p + (WINDOW - 1) - i[:, None], p + (2 * WINDOW - 2) - j[:, None])
    terms = tl.gather(products, tl.where(p < 2 * WINDOW, row, 0), 1)
    return tl.where(p < 2 * WINDOW, terms, 0.0).to(queries.dtype)


@triton.jit
def _product_grads(grad_terms, i, j, WINDOW: tl.constexpr, BLOCK_R: tl.constexpr):
    """Gradients [queries, BLOCK_R] of products with the embeddings, from those of the position terms."""
    rows: tl.constexpr = 2 * WINDOW - 1
    r = tl.arange(0, BLOCK_R)[None, :]
    place = tl.where(r < rows, r + i[:, None], r - rows + j[:, None]) - (WINDOW - 1)
    inside = (r < 2 * rows) & (place >= 0) & (place < WINDOW)
    gathered = tl.gather(grad_terms, tl.where(inside, tl.where(r < rows, place, place + WINDOW), 0), 1)
    return tl.where(inside, gathered, 0.0)


@triton.jit
def _selects(c, WINDOW: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_P, keys]: whether a key of the window's list lies in row p, or in column p - WINDOW."""
    p = tl.arange(0, BLOCK_P)[:, None]
    return (p == (c // WINDOW)[None, :]) | (p == (c % WINDOW + WINDOW)[None, :])


@triton.jit
def _scores(queries, keys, terms, selects, scale, keep, PRECISION: tl.constexpr):
    """Scores [queries, keys] in base 2, with position terms, and -inf where a query does not see a key."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
    scores = tl.dot(terms, selects.to(terms.dtype), scores, input_precision=PRECISION)
    return tl.where(keep, scores, float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q, k, v, rel_height, rel_width, q_step, q_head, k_step, k_head, v_step, v_head, height, width, scale, out, lse,
    G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, HALO: tl.constexpr, STRIDE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Online softmax of queries of a block over the keys of its window."""
    window: tl.constexpr = BLOCK + 2 * HALO
    rows, columns = tl.cdiv(height, BLOCK), tl.cdiv(width, BLOCK)
    q_height, q_width = tl.cdiv(height, STRIDE), tl.cdiv(width, STRIDE)
    groups: tl.constexpr = (BLOCK // STRIDE * (BLOCK // STRIDE) + BLOCK_M - 1) // BLOCK_M
    g, block, group, b = program_place(tl.program_id(0), rows * columns, groups, G)
    i, j, at, m_inside = _queries(
        block, group * BLOCK_M + tl.arange(0, BLOCK_M), columns, q_height, q_width, BLOCK, STRIDE
    )
    first = b * (q_height * q_width)  # of the sample's queries
    k += b * (height * width) * k_step + g * k_head
    v += b * (height * width) * v_step + g * v_head
    queries = load_rows(q + first * q_step + g * q_head, at, q_step, m_inside, D, BLOCK_D)
    embeddings = _embeddings(rel_height, rel_width, window, D, BLOCK_R, BLOCK_D)
    terms = _position_terms(queries, embeddings, i, j, window, BLOCK_P, PRECISION)
    highest, total, accumulated = softmax_start(BLOCK_M, BLOCK_V)
    for start in range(0, window * window, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        key_at, on_map = _window_keys(block, c, columns, height, width, BLOCK, HALO)
        keys = load_rows(k, key_at, k_step, on_map, D, BLOCK_D)  # zeros beyond the map
        values = load_rows(v, key_at, v_step, on_map, V, BLOCK_V)
        keep = on_map if MASK else c < window * window
        scores = _scores(queries, keys, terms, _selects(c, window, BLOCK_P), scale, keep[None, :], PRECISION)
        p, highest, total, accumulated = softmax_step(scores, highest, total, accumulated)
        accumulated += tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    outputs, logarithm = softmax_end(highest, total, accumulated)
    store_rows(out + (first * G + g) * V, at, G * V, outputs, m_inside, V, BLOCK_V)
    tl.store(lse + first * G + g + at * G, logarithm, mask=m_inside)


@triton.jit(do_not_specialize=_SIZES)
def _query_grad_kernel(
    q, k, v, rel_height, rel_width, q_step, q_head, k_step, k_head, v_step, v_head, height, width, scale,
    out, lse, grad, delta, terms, grad_q, parts, programs,
    G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, HALO: tl.constexpr, STRIDE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and what they give to those of the embeddings, for one program in `programs`.

    Writes for the kernel of keys: `delta`, the products of outputs and their gradients, and the position terms.
    """
    window: tl.constexpr = BLOCK + 2 * HALO
    rows, columns = tl.cdiv(height, BLOCK), tl.cdiv(width, BLOCK)
    q_height, q_width = tl.cdiv(height, STRIDE), tl.cdiv(width, STRIDE)
    groups: tl.constexpr = (BLOCK // STRIDE * (BLOCK // STRIDE) + BLOCK_M - 1) // BLOCK_M
    embeddings = _embeddings(rel_height, rel_width, window, D, BLOCK_R, BLOCK_D)
    grad_embeddings = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for program in range(tl.program_id(0), programs, tl.num_programs(0)):
        g, block, group, b = program_place(program, rows * columns, groups, G)
        i, j, at, m_inside = _queries(
            block, group * BLOCK_M + tl.arange(0, BLOCK_M), columns, q_height, q_width, BLOCK, STRIDE
        )
        first = b * (q_height * q_width)
        own_k = k + b * (height * width) * k_step + g * k_head
        own_v = v + b * (height * width) * v_step + g * v_head
        queries = load_rows(q + first * q_step + g * q_head, at, q_step, m_inside, D, BLOCK_D)
        grads = load_rows(grad + (first * G + g) * V, at, G * V, m_inside, V, BLOCK_V)
        outs = load_rows(out + (first * G + g) * V, at, G * V, m_inside, V, BLOCK_V)
        logarithm = tl.load(lse + first * G + g + at * G, mask=m_inside, other=float("inf"))
        product = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
        tl.store(delta + first * G + g + at * G, product, mask=m_inside)
        own_terms = _position_terms(queries, embeddings, i, j, window, BLOCK_P, PRECISION)
        store_rows(terms + (first * G + g) * (2 * window), at, G * 2 * window, own_terms, m_inside, 2 * window, BLOCK_P)
        accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        grad_terms = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
        for start in range(0, window * window, BLOCK_N):
            c = start + tl.arange(0, BLOCK_N)
            key_at, on_map = _window_keys(block, c, columns, height, width, BLOCK, HALO)
            keys = load_rows(own_k, key_at, k_step, on_map, D, BLOCK_D)
            values = load_rows(own_v, key_at, v_step, on_map, V, BLOCK_V)
            keep = on_map if MASK else c < window * window
            selects = _selects(c, window, BLOCK_P)
            scores = _scores(queries, keys, own_terms, selects, scale, keep[None, :], PRECISION)
            grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            grad_scores = (tl.exp2(scores - logarithm[:, None]) * (grad_p - product[:, None])).to(keys.dtype)
            accumulated += tl.dot(grad_scores, keys, input_precision=PRECISION)
            grad_terms += tl.dot(grad_scores, tl.trans(selects.to(keys.dtype)), input_precision=PRECISION)
        grad_products = _product_grads(grad_terms, i, j, window, BLOCK_R).to(queries.dtype)
        accumulated = tl.dot(grad_products, embeddings, accumulated * scale, input_precision=PRECISION)
        store_rows(grad_q + (first * G + g) * D, at, G * D, accumulated, m_inside, D, BLOCK_D)
        grad_embeddings += tl.dot(tl.trans(grad_products), queries, input_precision=PRECISION)
    r = tl.arange(0, BLOCK_R)
    size: tl.constexpr = 2 * (2 * window - 1)  # rows of both tables
    store_rows(parts + tl.program_id(0).to(tl.int64) * (size * D), r, D, grad_embeddings, r < size, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _key_grad_kernel(
    q, k, v, rel_height, rel_width, q_step, q_head, k_step, k_head, v_step, v_head, height, width, scale,
    lse, grad, delta, terms, grad_k, grad_v,
    G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, HALO: tl.constexpr, STRIDE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over the queries of all blocks whose windows meet it."""
    window: tl.constexpr = BLOCK + 2 * HALO
    side: tl.constexpr = BLOCK // STRIDE
    q_height, q_width = tl.cdiv(height, STRIDE), tl.cdiv(width, STRIDE)
    across = tl.cdiv(width, TILE)
    g, tile, _, b = program_place(tl.program_id(0), tl.cdiv(height, TILE) * across, 1, G)
    top, left = tile // across * TILE, tile % across * TILE
    own = tl.arange(0, TILE * TILE)
    key_y, key_x = top + own // TILE, left + own % TILE
    key_at, inside = key_y * width + key_x, (key_y < height) & (key_x < width)
    first, first_key = b * (q_height * q_width), b * (height * width)
    q += first * q_step + g * q_head
    lse += first * G + g
    grad += (first * G + g) * V
    delta += first * G + g
    terms += (first * G + g) * (2 * window)
    keys = load_rows(k + first_key * k_step + g * k_head, key_at, k_step, inside, D, BLOCK_D)
    values = load_rows(v + first_key * v_step + g * v_head, key_at, v_step, inside, V, BLOCK_V)
    # the blocks whose windows meet the tile
    row, column = tl.maximum(top - HALO, 0) // BLOCK, tl.maximum(left - HALO, 0) // BLOCK
    rows = tl.minimum((top + (TILE - 1 + HALO)) // BLOCK + 1, tl.cdiv(height, BLOCK)) - row
    columns = tl.minimum((left + (TILE - 1 + HALO)) // BLOCK + 1, tl.cdiv(width, BLOCK)) - column
    # terms of the tile's rows, then of its columns: 16 at most
    t = tl.arange(0, 16)
    selects = (t[:, None] == (own // TILE)[None, :]) | (t[:, None] == (own % TILE + TILE)[None, :])
    accumulated_k = tl.zeros([TILE * TILE, BLOCK_D], tl.float32)
    accumulated_v = tl.zeros([TILE * TILE, BLOCK_V], tl.float32)
    for start in range(0, rows * columns * (side * side), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        block = m // (side * side)
        block_y, block_x = row + block // columns, column + block % columns
        y, x = block_y * side + m % (side * side) // side, block_x * side + m % side
        at, m_inside = y * q_width + x, (block < rows * columns) & (y < q_height) & (x < q_width)
        # where the tile begins in the windows
        window_y, window_x = top + HALO - block_y * BLOCK, left + HALO - block_x * BLOCK
        queries = load_rows(q, at, q_step, m_inside, D, BLOCK_D)
        grads = load_rows(grad, at, G * V, m_inside, V, BLOCK_V)
        logarithm = tl.load(lse + at * G, mask=m_inside, other=float("inf"))
        product = tl.load(delta + at * G, mask=m_inside, other=0.0)
        place = tl.where(t[None, :] < TILE, window_y[:, None], window_x[:, None] - TILE) + t[None, :]
        own_terms = tl.load(
            terms + (at * (G * 2 * window))[:, None] + place + tl.where(t < TILE, 0, window)[None, :],
            mask=m_inside[:, None] & (place >= 0) & (place < window) & (t < 2 * TILE)[None, :],
            other=0.0,
        )
        key_row, key_column = window_y[:, None] + (own // TILE)[None, :], window_x[:, None] + (own % TILE)[None, :]
        keep = (key_row >= 0) & (key_row < window) & (key_column >= 0) & (key_column < window)
        scores = _scores(queries, keys, own_terms, selects, scale, keep, PRECISION)
        grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        p = tl.exp2(scores - logarithm[:, None])
        grad_scores = p * (grad_p - product[:, None])
        accumulated_v += tl.dot(tl.trans(p.to(grads.dtype)), grads, input_precision=PRECISION)
        accumulated_k += tl.dot(tl.trans(grad_scores.to(queries.dtype)), queries, input_precision=PRECISION)
    store_rows(grad_k + (first_key * G + g) * D, key_at, G * D, accumulated_k * scale, inside, D, BLOCK_D)
    store_rows(grad_v + (first_key * G + g) * V, key_at, G * V, accumulated_v, inside, V, BLOCK_V)
