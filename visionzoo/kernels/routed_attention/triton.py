"""Triton kernels of routed attention, forward and backward; keys and values are read where they lie, never copied.

A program computes a block of one region's queries, for one head. It walks the keys of the listed regions as one flat
list, so that small regions fill blocks together: key j of the list is token j mod n of region index[j div n]. The
gradients of keys and values walk the opposite lists (which regions list this one), written by `_invert_kernel`.
Nothing is summed by atomics: results are the same from run to run.

Blocks have few sizes, by the tokens of a region; batch, map, heads and lists are plain arguments, so that neither a new
image size nor a stage with more heads compiles anything new.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels import flops
from visionzoo.kernels.flash import (
    LOG2_E,
    load_rows,
    program_place,
    softmax_end,
    softmax_start,
    softmax_step,
    store_rows,
)
from visionzoo.kernels.launch import block_size, blocks, check_numbers, dot_precision, head_block, run, token_rows
from visionzoo.kernels.operator import operator

# arguments that vary with batch and image: the compiler must not look at their values
_SIZES = [
    "bias_step", "height", "width", "rows", "columns", "listed", "valid_height", "valid_width", "windows", "splits",
    "count", "size", "G",
]  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    *,
    regions: tuple[int, int],
    scale: float,
    bias: Tensor | None,
    segments: Tensor | None,
    weights: Tensor | None,
    valid_size: tuple[int, int] | None,
) -> Tensor:
    """Attention of [B, H, W, G, D] tensors as `routed_attention` says."""
    return _attend(q, k, v, index, bias, segments, weights, list(regions), scale, list(valid_size or ()))[0]


# -- operators --------------------------------------------------------------------------------------------------------


def _attend_fake(q, k, v, index, bias, segments, weights, regions, scale, valid_size):
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)


def _save(ctx, inputs, output):
    q, k, v, index, bias, segments, weights, ctx.regions, ctx.scale, ctx.valid_size = inputs
    ctx.save_for_backward(*output, q, k, v, index, bias, segments, weights)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 10
    needs = ctx.needs_input_grad
    *grads, grad_bias, grad_weights = _attend_backward(
        grad, *ctx.saved_tensors, ctx.regions, ctx.scale, ctx.valid_size, needs[4], needs[6]
    )
    return *grads, None, grad_bias if needs[4] else None, None, grad_weights if needs[6] else None, None, None, None


@operator("routed_attention", fake=_attend_fake, save=_save, differentiate=_differentiate, flops=flops.routed_attention)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    segments: Tensor | None,
    weights: Tensor | None,
    regions: list[int],
    scale: float,
    valid_size: list[int],
) -> tuple[Tensor, Tensor]:
    """Output [B, H, W, G, D] and, for the backward pass, the base-2 logarithm of the softmax sums [B, H, W, G]."""
    call = _Call(q, k, v, index, bias, segments, weights, regions, scale, valid_size)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    call.launch(_forward_kernel, call.programs, out, lse)
    return out, lse


def _attend_backward_fake(
    grad, out, lse, q, k, v, index, bias, segments, weights, regions, scale, valid_size, bias_grad, weights_grad
):
    return (
        *(q.new_empty(q.shape) for _ in range(3)),
        bias.new_empty(bias.shape) if bias_grad else q.new_empty(0),
        weights.new_empty(weights.shape) if weights_grad else q.new_empty(0),
    )


@operator("routed_attention_backward", fake=_attend_backward_fake, flops=flops.backward(flops.routed_attention, 3))
def _attend_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    segments: Tensor | None,
    weights: Tensor | None,
    regions: list[int],
    scale: float,
    valid_size: list[int],
    bias_grad: bool,
    weights_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias and weights; the last two are empty where they are not asked for."""
    call = _Call(q, k, v, index, bias, segments, weights, regions, scale, valid_size)
    grad = grad.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    delta = torch.empty_like(lse)
    call.launch(_query_grad_kernel, call.programs, out, lse, grad, delta, grad_q)
    call.launch(_key_grad_kernel, call.programs, lse, grad, delta, *call.inverse_lists(), grad_k, grad_v)
    grad_bias, grad_weights = q.new_empty(0), q.new_empty(0)
    if bias_grad and bias is not None:
        windows, splits = call.bias_windows(bias)
        parts = torch.empty((splits, *bias.shape), dtype=torch.float32, device=q.device)
        call.launch(_bias_grad_kernel, call.bias_programs(bias, splits), lse, grad, delta, parts, windows, splits)
        grad_bias = parts.sum(0).to(bias.dtype)
    if weights_grad and weights is not None:
        parts = torch.empty((*weights.shape, q.shape[3]), dtype=torch.float32, device=q.device)
        call.launch(_weights_grad_kernel, parts.numel(), lse, grad, delta, parts)
        grad_weights = parts.sum(-1).to(weights.dtype)
    return grad_q, grad_k, grad_v, grad_bias, grad_weights


class _Call:
    """One call's tensors and numbers, in the order in which every kernel takes them."""

    def __init__(self, q, k, v, index, bias, segments, weights, regions, scale, valid_size):
        (q, q_step), (k, k_step), (v, v_step) = token_rows(q), token_rows(k), token_rows(v)
        batch, height, width, heads, head_dim = q.shape
        check_numbers("of a bias", 0 if bias is None else bias.numel())
        rows, columns = regions
        self.device, self.batch = q.device, batch
        self.n, self.count = height // rows * (width // columns), rows * columns
        self.listed = 1 if index is None else index.shape[2]
        self.index, bias, segments, weights = (
            t if t is None or t.is_contiguous() else t.contiguous() for t in (index, bias, segments, weights)
        )
        bias_step = bias.stride(0) if bias is not None and bias.ndim == 4 and len(bias) > 1 else 0
        valid_height, valid_width = valid_size or (None, None)
        self.arguments = (
            q, k, v, self.index, bias, segments, weights, q_step, k_step, v_step, bias_step, height, width, rows,
            columns, self.listed, valid_height, valid_width, scale,
        )  # fmt: skip
        self.own_block = block_size(self.n, q.dtype)  # of one region's queries or keys, against those that they meet
        self.extras = bias is not None or segments is not None or q.dtype == torch.float32
        self.block_d = head_block(head_dim)
        self.options = {"G": heads, "D": head_dim, "BLOCK_D": self.block_d, "PRECISION": dot_precision(q.dtype)}
        self.programs = batch * self.count * heads * blocks(self.n, self.own_block)  # that cover the map

    def launch(self, kernel, programs: int, *tensors) -> None:
        """Run a kernel with this call's arguments, then `tensors`.

        Sizes by trial on an H100 (bfloat16, 56² to 14², head width 32): blocks of 32 on the other side, one warp, two
        stages; two accumulators want the double.
        """
        own, other, accumulators = self.own_block, 32, 1
        if kernel is _key_grad_kernel:
            other, accumulators = max(32, own), 2
        warps = max(1, min(8, own * self.block_d * accumulators // 2048)) * (2 if self.extras else 1)
        block_m, block_n = (other, own) if kernel is _key_grad_kernel else (own, other)
        run(
            kernel,
            programs,
            *self.arguments,
            *tensors,
            **self.options,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=2,
        )

    def bias_windows(self, bias: Tensor) -> tuple[int, int]:
        """Windows that share a bias, and into how many parts to split them so that a GPU has enough programs."""
        windows = self.batch * (1 if bias.ndim == 4 and len(bias) > 1 else self.count)
        return windows, min(windows, max(1, 1024 // self.bias_programs(bias, 1)))

    def bias_programs(self, bias: Tensor, splits: int) -> int:
        """How many programs cover all tiles of a bias, `splits` times."""
        tiles = blocks(self.n, self.own_block) * blocks(self.listed * self.n, 32)
        return splits * tiles * (bias.numel() // (self.n * self.n * self.listed))

    def inverse_lists(self) -> tuple[Tensor | None, Tensor | None]:
        """For each region where its list starts and ends, [B, R + 1], and the lists' entries r·K + place, [B, R·K]."""
        if self.index is None:
            return None, None
        size = self.count * self.listed
        starts = torch.empty((self.batch, self.count + 1), dtype=torch.int32, device=self.device)
        entries = torch.empty((self.batch, size), dtype=torch.int32, device=self.device)
        run(
            _invert_kernel,
            self.batch * self.count,
            self.index,
            starts,
            entries,
            self.count,
            size,
            BLOCK=256,
            num_warps=4,
        )
        return starts, entries


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _place(region, token, columns, tall, wide, width):
    """Return the number of a region's token on the map; regions, their tokens and the map are counted row by row."""
    return ((region // columns) * tall + token // wide) * width + (region % columns) * wide + token % wide


@triton.jit
def _listed_keys(index, own, j, listed, n, count):
    """Region, token and place in the list of the flat list's keys j, and which of them exist."""
    place = j // n
    inside = place < listed
    if index is not None:
        region = tl.load(index + place, mask=inside, other=0)
        inside = inside & (region >= 0) & (region < count)  # a region that does not exist is left out, never read
        region = tl.where(inside, region, 0).to(tl.int32)
    else:
        region = place * 0 + own
    return region, j - place * n, place, inside


@triton.jit
def _adjust(
    scores, scale, bias, bias_row, bias_column, segments, query_at, query_inside, key_at, key_inside, width,
    valid_height, valid_width,
):  # fmt: skip
    """Scores [queries, keys] in base 2: scaled, with bias, and -inf where a query may not see a key."""
    scores = scores * (scale * LOG2_E)
    keep = query_inside[:, None] & key_inside[None, :]
    if bias is not None:
        at = bias + bias_row[:, None] + bias_column[None, :]
        scores += tl.load(at, mask=keep, other=0.0).to(tl.float32) * LOG2_E
    if valid_height is not None:
        keep = keep & ((key_at // width < valid_height) & (key_at % width < valid_width))[None, :]
    if segments is not None:
        query_segment = tl.load(segments + query_at, mask=query_inside, other=0)
        key_segment = tl.load(segments + key_at, mask=key_inside, other=0)
        keep = keep & (query_segment[:, None] == key_segment[None, :])
    return tl.where(keep, scores, float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q, k, v, index, bias, segments, weights, q_step, k_step, v_step, bias_step, height, width, rows, columns, listed,
    valid_height, valid_width, scale, out, lse,
    G, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries over the keys of the listed regions."""
    tall, wide, count = height // rows, width // columns, rows * columns
    n = tall * wide
    g, region, block, b = program_place(tl.program_id(0), count, tl.cdiv(n, BLOCK_M), G)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_inside = m < n
    at = _place(region, m, columns, tall, wide, width)
    first = b * (height * width)  # of the sample's tokens
    q += first * q_step + g * D
    k += first * k_step + g * D
    v += first * v_step + g * D
    out += (first * G + g) * D
    lse += first * G + g
    lists = (b * count + region) * listed
    if index is not None:
        index += lists
    if weights is not None:
        weights += lists
    bias_row = region * bias_step + (g * n + m) * (listed * n)
    queries = load_rows(q, at, q_step, m_inside, D, BLOCK_D)
    highest, total, accumulated = softmax_start(BLOCK_M, BLOCK_D)
    for start in range(0, listed * n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        other, token, place, inside = _listed_keys(index, region, j, listed, n, count)
        key_at = _place(other, token, columns, tall, wide, width)
        keys = load_rows(k, key_at, k_step, inside, D, BLOCK_D)
        values = load_rows(v, key_at, v_step, inside, D, BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if weights is not None:
            weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
            scores *= weight[None, :]
        scores = _adjust(
            scores, scale, bias, bias_row, j, segments, at, m_inside, key_at, inside, width, valid_height, valid_width,
        )  # fmt: skip
        p, highest, total, accumulated = softmax_step(scores, highest, total, accumulated)
        if weights is not None:
            p *= weight[None, :]
        accumulated += tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    outputs, logarithm = softmax_end(highest, total, accumulated)
    store_rows(out, at, G * D, outputs, m_inside, D, BLOCK_D)
    tl.store(lse + at * G, logarithm, mask=m_inside)


@triton.jit(do_not_specialize=_SIZES)
def _query_grad_kernel(
    q, k, v, index, bias, segments, weights, q_step, k_step, v_step, bias_step, height, width, rows, columns, listed,
    valid_height, valid_width, scale, out, lse, grad, delta, grad_q,
    G, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries, and `delta`, the product of output and its gradient, for the other kernels."""
    tall, wide, count = height // rows, width // columns, rows * columns
    n = tall * wide
    g, region, block, b = program_place(tl.program_id(0), count, tl.cdiv(n, BLOCK_M), G)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_inside = m < n
    at = _place(region, m, columns, tall, wide, width)
    first = b * (height * width)  # of the sample's tokens
    q += first * q_step + g * D
    k += first * k_step + g * D
    v += first * v_step + g * D
    out += (first * G + g) * D
    lse += first * G + g
    grad += (first * G + g) * D
    delta += first * G + g
    grad_q += (first * G + g) * D
    lists = (b * count + region) * listed
    if index is not None:
        index += lists
    if weights is not None:
        weights += lists
    bias_row = region * bias_step + (g * n + m) * (listed * n)
    queries = load_rows(q, at, q_step, m_inside, D, BLOCK_D)
    grads = load_rows(grad, at, G * D, m_inside, D, BLOCK_D)
    outs = load_rows(out, at, G * D, m_inside, D, BLOCK_D)
    logarithm = tl.load(lse + at * G, mask=m_inside, other=float("inf"))
    product = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + at * G, product, mask=m_inside)
    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, listed * n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        other, token, place, inside = _listed_keys(index, region, j, listed, n, count)
        key_at = _place(other, token, columns, tall, wide, width)
        keys = load_rows(k, key_at, k_step, inside, D, BLOCK_D)
        values = load_rows(v, key_at, v_step, inside, D, BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        if weights is not None:
            weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
            scores *= weight[None, :]
            grad_p *= weight[None, :]
        scores = _adjust(
            scores, scale, bias, bias_row, j, segments, at, m_inside, key_at, inside, width, valid_height, valid_width,
        )  # fmt: skip
        grad_scores = tl.exp2(scores - logarithm[:, None]) * (grad_p - product[:, None])
        if weights is not None:
            grad_scores *= weight[None, :]
        accumulated += tl.dot(grad_scores.to(keys.dtype), keys, input_precision=PRECISION)
    store_rows(grad_q, at, G * D, accumulated * scale, m_inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _key_grad_kernel(
    q, k, v, index, bias, segments, weights, q_step, k_step, v_step, bias_step, height, width, rows, columns, listed,
    valid_height, valid_width, scale, lse, grad, delta, starts, entries, grad_k, grad_v,
    G, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of one region's keys and values, over the queries of all regions that list it."""
    tall, wide, count = height // rows, width // columns, rows * columns
    n = tall * wide
    g, region, block, b = program_place(tl.program_id(0), count, tl.cdiv(n, BLOCK_N), G)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < n
    key_at = _place(region, token, columns, tall, wide, width)
    first = b * (height * width)  # of the sample's tokens
    q += first * q_step + g * D
    k += first * k_step + g * D
    v += first * v_step + g * D
    lse += first * G + g
    grad += (first * G + g) * D
    delta += first * G + g
    grad_k += (first * G + g) * D
    grad_v += (first * G + g) * D
    keys = load_rows(k, key_at, k_step, inside, D, BLOCK_D)
    values = load_rows(v, key_at, v_step, inside, D, BLOCK_D)
    if weights is not None:
        weights += b * (count * listed)
    listings = 1
    if index is not None:
        starts += b * (count + 1) + region
        listings = tl.load(starts + 1) - tl.load(starts)
        entries += b * (count * listed) + tl.load(starts)
    accumulated_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    accumulated_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, listings * n, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        m_inside = i < listings * n
        if index is not None:
            entry = tl.load(entries + i // n, mask=m_inside, other=0)
        else:
            entry = i * 0 + region
        other = entry // listed
        m = i % n
        at = _place(other, m, columns, tall, wide, width)
        queries = load_rows(q, at, q_step, m_inside, D, BLOCK_D)
        grads = load_rows(grad, at, G * D, m_inside, D, BLOCK_D)
        logarithm = tl.load(lse + at * G, mask=m_inside, other=float("inf"))
        product = tl.load(delta + at * G, mask=m_inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        if weights is not None:
            weight = tl.load(weights + entry, mask=m_inside, other=0.0).to(tl.float32)
            scores *= weight[:, None]
            grad_p *= weight[:, None]
        bias_row = other * bias_step + (g * n + m) * (listed * n) + (entry % listed) * n
        scores = _adjust(
            scores, scale, bias, bias_row, token, segments, at, m_inside, key_at, inside, width, valid_height,
            valid_width,
        )  # fmt: skip
        p = tl.exp2(scores - logarithm[:, None])
        grad_scores = p * (grad_p - product[:, None])
        if weights is not None:
            p *= weight[:, None]
            grad_scores *= weight[:, None]
        accumulated_v += tl.dot(tl.trans(p.to(grads.dtype)), grads, input_precision=PRECISION)
        accumulated_k += tl.dot(tl.trans(grad_scores.to(queries.dtype)), queries, input_precision=PRECISION)
    store_rows(grad_k, key_at, G * D, accumulated_k * scale, inside, D, BLOCK_D)
    store_rows(grad_v, key_at, G * D, accumulated_v, inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _bias_grad_kernel(
    q, k, v, index, bias, segments, weights, q_step, k_step, v_step, bias_step, height, width, rows, columns, listed,
    valid_height, valid_width, scale, lse, grad, delta, parts, windows, splits,
    G, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum of the scores' gradients, for a tile of the bias, over every `splits`-th of the windows that share it."""
    tall, wide, count = height // rows, width // columns, rows * columns
    n = tall * wide
    across, down = tl.cdiv(listed * n, BLOCK_N), tl.cdiv(n, BLOCK_M)
    program = tl.program_id(0)
    split = program % splits
    j = program // splits % across * BLOCK_N + tl.arange(0, BLOCK_N)
    m = program // (splits * across) % down * BLOCK_M + tl.arange(0, BLOCK_M)
    bias_head = program // (splits * across * down)  # over the regions, where each has its own bias
    g, own = bias_head % G, bias_head // G
    m_inside = m < n
    none = (program * 0).to(tl.int64)  # samples are counted in 64 bits
    accumulated = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in range(split, windows, splits):
        region, b = own, none + window
        if bias_step == 0:
            region, b = window % count, none + window // count
        at = _place(region, m, columns, tall, wide, width)
        first = b * (height * width)
        lists = (b * count + region) * listed
        own_index = index + lists if index is not None else None
        other, token, place, inside = _listed_keys(own_index, region, j, listed, n, count)
        key_at = _place(other, token, columns, tall, wide, width)
        keys = load_rows(k + first * k_step + g * D, key_at, k_step, inside, D, BLOCK_D)
        values = load_rows(v + first * v_step + g * D, key_at, v_step, inside, D, BLOCK_D)
        queries = load_rows(q + first * q_step + g * D, at, q_step, m_inside, D, BLOCK_D)
        grads = load_rows(grad + (first * G + g) * D, at, G * D, m_inside, D, BLOCK_D)
        logarithm = tl.load(lse + first * G + g + at * G, mask=m_inside, other=float("inf"))
        product = tl.load(delta + first * G + g + at * G, mask=m_inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        if weights is not None:
            weight = tl.load(weights + lists + place, mask=inside, other=0.0).to(tl.float32)
            scores *= weight[None, :]
            grad_p *= weight[None, :]
        bias_row = region * bias_step + (g * n + m) * (listed * n)
        scores = _adjust(
            scores, scale, bias, bias_row, j, segments, at, m_inside, key_at, inside, width, valid_height, valid_width,
        )  # fmt: skip
        accumulated += tl.exp2(scores - logarithm[:, None]) * (grad_p - product[:, None])
    size = (tl.num_programs(0) // (splits * across * down)).to(tl.int64) * n * (listed * n)  # of the bias
    row = (bias_head * n + m) * (listed * n)
    tl.store(
        parts + split * size + row[:, None] + j[None, :],
        accumulated,
        mask=m_inside[:, None] & (j < listed * n)[None, :],
    )


@triton.jit(do_not_specialize=_SIZES)
def _weights_grad_kernel(
    q, k, v, index, bias, segments, weights, q_step, k_step, v_step, bias_step, height, width, rows, columns, listed,
    valid_height, valid_width, scale, lse, grad, delta, parts,
    G, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head's share of the gradient of one listed region's weight."""
    tall, wide, count = height // rows, width // columns, rows * columns
    n = tall * wide
    program = tl.program_id(0)
    g, entry = program % G, program // G  # entries of all samples' lists
    place, region = entry % listed, entry // listed % count
    b = (entry // (listed * count)).to(tl.int64)
    first = b * (height * width)  # of the sample's tokens
    q += first * q_step + g * D
    k += first * k_step + g * D
    v += first * v_step + g * D
    lse += first * G + g
    grad += (first * G + g) * D
    delta += first * G + g
    weight = tl.load(weights + entry).to(tl.float32)
    summed = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(0, n, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        m_inside = m < n
        at = _place(region, m, columns, tall, wide, width)
        queries = load_rows(q, at, q_step, m_inside, D, BLOCK_D)
        grads = load_rows(grad, at, G * D, m_inside, D, BLOCK_D)
        logarithm = tl.load(lse + at * G, mask=m_inside, other=float("inf"))
        product = tl.load(delta + at * G, mask=m_inside, other=0.0)
        bias_row = region * bias_step + (g * n + m) * (listed * n)
        for start in range(0, n, BLOCK_N):
            own_token = start + tl.arange(0, BLOCK_N)
            j = place * n + own_token
            other, token, _, inside = _listed_keys(index + entry - place, region, j, listed, n, count)
            inside = inside & (own_token < n)
            key_at = _place(other, token, columns, tall, wide, width)
            keys = load_rows(k, key_at, k_step, inside, D, BLOCK_D)
            values = load_rows(v, key_at, v_step, inside, D, BLOCK_D)
            plain = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            plain_grad = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            scores = _adjust(
                plain * weight, scale, bias, bias_row, j, segments, at, m_inside, key_at, inside, width,
                valid_height, valid_width,
            )  # fmt: skip
            p = tl.exp2(scores - logarithm[:, None])
            grad_scores = p * (plain_grad * weight - product[:, None])
            summed += tl.sum(grad_scores * plain * scale + p * plain_grad, 1)
    tl.store(parts + program, tl.sum(summed, 0))


@triton.jit(do_not_specialize=_SIZES)
def _invert_kernel(index, starts, entries, count, size, BLOCK: tl.constexpr):
    """Write the entries of a sample's lists that name one region, in order, behind those that name lower ones."""
    region = tl.program_id(0) % count
    b = (tl.program_id(0) // count).to(tl.int64)
    before = 0
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        named = tl.load(index + b * size + entry, mask=entry < size, other=-1)
        before += tl.sum(((named >= 0) & (named < region)).to(tl.int32), 0)
    tl.store(starts + b * (count + 1) + region, before)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        named = tl.load(index + b * size + entry, mask=entry < size, other=-1)
        here = (named == region).to(tl.int32)
        tl.store(entries + b * size + before + tl.cumsum(here, 0) - here, entry, mask=here > 0)
        before += tl.sum(here, 0)
    if region == count - 1:
        tl.store(starts + b * (count + 1) + count, before)
