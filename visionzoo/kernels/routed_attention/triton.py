"""Triton kernels of routed attention, forward and backward; keys and values are read where they lie, never copied.

A program computes a block of one region's queries, for one head. It walks the keys of the listed regions as one flat
list, so that small regions fill blocks together: key j of the list is token j mod n of region index[j div n]. The
gradients of keys and values walk the opposite lists (which regions list this one), written by `_invert_kernel`.
Nothing is summed by atomics: results are the same from run to run.

Scores are kept in base 2, since exp2 is what the hardware has. Blocks have three sizes, by the tokens of a region;
batch, map and lists are plain arguments, so that a new image size compiles nothing new.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels.launch import block_size, dense_rows, dot_precision, head_block, row_strides, warps

_LOG2_E = tl.constexpr(1.4426950408889634)
# arguments that vary with batch and image: the compiler must not look at their values
_SIZES = [
    "bias_r", "height", "width", "columns", "count", "tall", "wide", "listed", "valid_height", "valid_width", "windows",
    "splits", "size",
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
    valid = list(valid_size or ())
    return _attend(q, k, v, index, bias, segments, weights, list(regions), scale, valid)[0]


# -- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("visionzoo::routed_attention", mutates_args=())
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


@torch.library.custom_op("visionzoo::routed_attention_backward", mutates_args=())
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
    starts, entries = call.inverse_lists()
    call.launch(_key_grad_kernel, call.programs, lse, grad, delta, starts, entries, grad_k, grad_v)
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


@_attend.register_fake
def _(q, k, v, index, bias, segments, weights, regions, scale, valid_size):
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)


@_attend_backward.register_fake
def _(grad, out, lse, q, k, v, index, bias, segments, weights, regions, scale, valid_size, bias_grad, weights_grad):
    return (
        *(q.new_empty(q.shape) for _ in range(3)),
        bias.new_empty(bias.shape) if bias_grad else q.new_empty(0),
        weights.new_empty(weights.shape) if weights_grad else q.new_empty(0),
    )


def _save(ctx, inputs, output):
    q, k, v, index, bias, segments, weights, ctx.regions, ctx.scale, ctx.valid_size = inputs
    ctx.save_for_backward(*output, q, k, v, index, bias, segments, weights)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_lse):
    none = [None] * 3
    if grad is None:
        return (*[None] * 7, *none)
    needs = ctx.needs_input_grad
    *grads, grad_bias, grad_weights = _attend_backward(
        grad, *ctx.saved_tensors, ctx.regions, ctx.scale, ctx.valid_size, needs[4], needs[6]
    )
    return (*grads, None, grad_bias if needs[4] else None, None, grad_weights if needs[6] else None, *none)


_attend.register_autograd(_differentiate, setup_context=_save)


class _Call:
    """One call's tensors and numbers, in the order in which every kernel takes them."""

    def __init__(self, q, k, v, index, bias, segments, weights, regions, scale, valid_size):
        self.q, self.k, self.v = (dense_rows(t) for t in (q, k, v))
        batch, height, width, heads, head_dim = q.shape
        self.tall, self.wide = height // regions[0], width // regions[1]
        self.n, self.count = self.tall * self.wide, regions[0] * regions[1]
        self.listed = 1 if index is None else index.shape[2]
        self.batch, self.heads = batch, heads
        self.index = None if index is None else index.contiguous()
        bias_rows = 0
        if bias is not None:
            bias = bias.contiguous()
            bias_rows = bias.stride(0) if bias.ndim == 4 and len(bias) > 1 else 0
        none = q  # a pointer that is not read
        self.arguments = [
            self.q, self.k, self.v,
            none if index is None else self.index,
            none if bias is None else bias,
            none if segments is None else segments.contiguous(),
            none if weights is None else weights.contiguous(),
            *row_strides(self.q, self.k, self.v),
            bias_rows, height, width, heads, regions[1], self.count, self.tall, self.wide, self.listed,
            *(valid_size or (height, width)),
            scale,
        ]  # fmt: skip
        self.own_block = block_size(self.n, q.dtype)  # of one region's queries or keys, against those that it meets
        self.other_block = block_size(self.listed * self.n, q.dtype)
        self.options = {
            "D": head_dim,
            "BLOCK_D": head_block(head_dim),
            "HAS_INDEX": index is not None,
            "HAS_BIAS": bias is not None,
            "HAS_SEGMENTS": segments is not None,
            "HAS_VALID": bool(valid_size),
            "HAS_WEIGHTS": weights is not None,
            "PRECISION": dot_precision(q.dtype),
        }

    def launch(self, kernel, programs: int, *tensors) -> None:
        """Run a kernel with this call's arguments, then `tensors`."""
        block_m, block_n = self.own_block, self.other_block
        if kernel is _key_grad_kernel:
            block_m, block_n = block_n, block_m
        options = {**self.options, "BLOCK_M": block_m, "BLOCK_N": block_n}
        kernel[(programs,)](*self.arguments, *tensors, **options, num_warps=warps(block_m, block_n), num_stages=2)

    @property
    def programs(self) -> int:
        """How many programs cover all regions of all heads and samples."""
        return self.batch * self.count * self.heads * triton.cdiv(self.n, self.own_block)

    def bias_windows(self, bias: Tensor) -> tuple[int, int]:
        """Windows that share a bias, and into how many parts to split them so that a GPU has enough programs."""
        windows = self.batch * (1 if bias.ndim == 4 and len(bias) > 1 else self.count)
        return windows, min(windows, max(1, 1024 // self.bias_programs(bias, 1)))

    def bias_programs(self, bias: Tensor, splits: int) -> int:
        """How many programs cover all tiles of a bias, `splits` times."""
        tiles = triton.cdiv(self.n, self.own_block) * triton.cdiv(self.listed * self.n, self.other_block)
        return splits * tiles * (bias.numel() // (self.n * self.n * self.listed))

    def inverse_lists(self) -> tuple[Tensor, Tensor]:
        """For each region where its list starts and ends, [B, R + 1], and the lists' entries r·K + place, [B, R·K]."""
        if self.index is None:
            return self.q, self.q
        size = self.count * self.listed
        starts = torch.empty((self.batch, self.count + 1), dtype=torch.int32, device=self.q.device)
        entries = torch.empty((self.batch, size), dtype=torch.int32, device=self.q.device)
        _invert_kernel[(self.batch * self.count,)](
            self.index, starts, entries, self.count, size, BLOCK=256, num_warps=4
        )
        return starts, entries


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _program(heads, count, blocks):
    """Head, region, block and sample of this program; heads side by side, as their tokens lie."""
    program = tl.program_id(0)
    g = program % heads
    block = program // heads % blocks
    region = program // (heads * blocks) % count
    return g, region, block, (program // (heads * blocks * count)).to(tl.int64)


@triton.jit
def _place(region, token, columns, tall, wide):
    """Row and column on the map of a region's token; both are numbered row by row."""
    return (region // columns) * tall + token // wide, (region % columns) * wide + token % wide


@triton.jit
def _load_rows(pointer, y, x, stride_h, stride_w, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [tokens, D] of one head and sample, zeros where they are not `inside`."""
    d = tl.arange(0, BLOCK_D)
    at = pointer + (y * stride_h + x * stride_w)[:, None] + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_rows(pointer, token, heads, g, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows [tokens, D] of a head into one sample of a contiguous [B, H, W, G, D]."""
    d = tl.arange(0, BLOCK_D)
    at = pointer + ((token * heads + g) * D)[:, None] + d[None, :]
    tl.store(at, rows.to(pointer.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _load_dense(pointer, token, heads, g, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read what `_store_rows` writes."""
    d = tl.arange(0, BLOCK_D)
    at = pointer + ((token * heads + g) * D)[:, None] + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _listed_keys(index, own, j, listed, n, count, HAS_INDEX: tl.constexpr):
    """Region, token and place in the list of the flat list's keys j, and which of them exist."""
    place = j // n
    inside = place < listed
    if HAS_INDEX:
        region = tl.load(index + place, mask=inside, other=0)
        inside = inside & (region >= 0) & (region < count)  # a region that does not exist is left out, never read
        region = tl.where(inside, region, 0).to(tl.int32)
    else:
        region = place * 0 + own
    return region, j - place * n, place, inside


@triton.jit
def _adjust(
    scores, scale, bias, segments, bias_row, bias_column, query_y, query_x, key_y, key_x, query_inside, key_inside,
    width, valid_height, valid_width, HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Scores [queries, keys] in base 2: scaled, with bias, and -inf where a query may not see a key."""
    scores = scores * (scale * _LOG2_E)
    keep = query_inside[:, None] & key_inside[None, :]
    if HAS_BIAS:
        at = bias + bias_row[:, None] + bias_column[None, :]
        scores += tl.load(at, mask=keep, other=0.0).to(tl.float32) * _LOG2_E
    if HAS_VALID:
        keep = keep & ((key_y < valid_height) & (key_x < valid_width))[None, :]
    if HAS_SEGMENTS:
        query_segment = tl.load(segments + query_y * width + query_x, mask=query_inside, other=0)
        key_segment = tl.load(segments + key_y * width + key_x, mask=key_inside, other=0)
        keep = keep & (query_segment[:, None] == key_segment[None, :])
    return tl.where(keep, scores, float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q, k, v, index, bias, segments, weights, q_b, q_h, q_w, q_g, k_b, k_h, k_w, k_g, v_b, v_h, v_w, v_g,
    bias_r, height, width, heads, columns, count, tall, wide, listed, valid_height, valid_width, scale,
    out, lse,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries over the keys of the listed regions."""
    n = tall * wide
    g, region, block, b = _program(heads, count, tl.cdiv(n, BLOCK_M))
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_inside = m < n
    y, x = _place(region, m, columns, tall, wide)
    queries = _load_rows(q + b * q_b + g * q_g, y, x, q_h, q_w, m_inside, D, BLOCK_D)
    first = b * (height * width * heads)  # of the sample's tokens and heads
    lists = (b * count + region) * listed
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, listed * n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        other, token, place, inside = _listed_keys(index + lists, region, j, listed, n, count, HAS_INDEX)
        key_y, key_x = _place(other, token, columns, tall, wide)
        keys = _load_rows(k + b * k_b + g * k_g, key_y, key_x, k_h, k_w, inside, D, BLOCK_D)
        values = _load_rows(v + b * v_b + g * v_g, key_y, key_x, v_h, v_w, inside, D, BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if HAS_WEIGHTS:
            weight = tl.load(weights + lists + place, mask=inside, other=0.0).to(tl.float32)
            scores *= weight[None, :]
        scores = _adjust(
            scores, scale, bias, segments, region * bias_r + (g * n + m) * (listed * n), j, y, x, key_y, key_x,
            m_inside, inside, width, valid_height, valid_width, HAS_BIAS, HAS_SEGMENTS, HAS_VALID,
        )  # fmt: skip
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(p, 1)
        highest = new_highest
        if HAS_WEIGHTS:
            p *= weight[None, :]
        accumulated *= rescale[:, None]
        accumulated += tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    seen = total > 0.0  # a query without any key gives 0; infinity as its logarithm makes its gradients 0
    total = tl.where(seen, total, 1.0)
    at = y * width + x
    _store_rows(out + first * D, at, heads, g, accumulated / total[:, None], m_inside, D, BLOCK_D)
    tl.store(lse + first + at * heads + g, tl.where(seen, highest + tl.log2(total), float("inf")), mask=m_inside)


@triton.jit(do_not_specialize=_SIZES)
def _query_grad_kernel(
    q, k, v, index, bias, segments, weights, q_b, q_h, q_w, q_g, k_b, k_h, k_w, k_g, v_b, v_h, v_w, v_g,
    bias_r, height, width, heads, columns, count, tall, wide, listed, valid_height, valid_width, scale,
    out, lse, grad, delta, grad_q,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries, and `delta`, the product of output and its gradient, for the other kernels."""
    n = tall * wide
    g, region, block, b = _program(heads, count, tl.cdiv(n, BLOCK_M))
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_inside = m < n
    y, x = _place(region, m, columns, tall, wide)
    at = y * width + x
    first = b * (height * width * heads)
    queries = _load_rows(q + b * q_b + g * q_g, y, x, q_h, q_w, m_inside, D, BLOCK_D)
    grads = _load_dense(grad + first * D, at, heads, g, m_inside, D, BLOCK_D)
    outs = _load_dense(out + first * D, at, heads, g, m_inside, D, BLOCK_D)
    logarithm = tl.load(lse + first + at * heads + g, mask=m_inside, other=float("inf"))
    product = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + first + at * heads + g, product, mask=m_inside)
    lists = (b * count + region) * listed
    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, listed * n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        other, token, place, inside = _listed_keys(index + lists, region, j, listed, n, count, HAS_INDEX)
        key_y, key_x = _place(other, token, columns, tall, wide)
        keys = _load_rows(k + b * k_b + g * k_g, key_y, key_x, k_h, k_w, inside, D, BLOCK_D)
        values = _load_rows(v + b * v_b + g * v_g, key_y, key_x, v_h, v_w, inside, D, BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        if HAS_WEIGHTS:
            weight = tl.load(weights + lists + place, mask=inside, other=0.0).to(tl.float32)
            scores *= weight[None, :]
            grad_p *= weight[None, :]
        scores = _adjust(
            scores, scale, bias, segments, region * bias_r + (g * n + m) * (listed * n), j, y, x, key_y, key_x,
            m_inside, inside, width, valid_height, valid_width, HAS_BIAS, HAS_SEGMENTS, HAS_VALID,
        )  # fmt: skip
        grad_scores = tl.exp2(scores - logarithm[:, None]) * (grad_p - product[:, None])
        if HAS_WEIGHTS:
            grad_scores *= weight[None, :]
        accumulated += tl.dot(grad_scores.to(keys.dtype), keys, input_precision=PRECISION)
    _store_rows(grad_q + first * D, at, heads, g, accumulated * scale, m_inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _key_grad_kernel(
    q, k, v, index, bias, segments, weights, q_b, q_h, q_w, q_g, k_b, k_h, k_w, k_g, v_b, v_h, v_w, v_g,
    bias_r, height, width, heads, columns, count, tall, wide, listed, valid_height, valid_width, scale,
    lse, grad, delta, starts, entries, grad_k, grad_v,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of one region's keys and values, over the queries of all regions that list it."""
    n = tall * wide
    g, region, block, b = _program(heads, count, tl.cdiv(n, BLOCK_N))
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < n
    key_y, key_x = _place(region, token, columns, tall, wide)
    keys = _load_rows(k + b * k_b + g * k_g, key_y, key_x, k_h, k_w, inside, D, BLOCK_D)
    values = _load_rows(v + b * v_b + g * v_g, key_y, key_x, v_h, v_w, inside, D, BLOCK_D)
    first = b * (height * width * heads)
    listings, their_entries = 1, entries
    if HAS_INDEX:
        lists = starts + b * (count + 1) + region
        listings = tl.load(lists + 1) - tl.load(lists)
        their_entries = entries + b * (count * listed) + tl.load(lists)
    accumulated_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    accumulated_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, listings * n, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        m_inside = i < listings * n
        if HAS_INDEX:
            entry = tl.load(their_entries + i // n, mask=m_inside, other=0)
        else:
            entry = i * 0 + region
        other = entry // listed
        m = i % n
        y, x = _place(other, m, columns, tall, wide)
        at = y * width + x
        queries = _load_rows(q + b * q_b + g * q_g, y, x, q_h, q_w, m_inside, D, BLOCK_D)
        grads = _load_dense(grad + first * D, at, heads, g, m_inside, D, BLOCK_D)
        logarithm = tl.load(lse + first + at * heads + g, mask=m_inside, other=float("inf"))
        product = tl.load(delta + first + at * heads + g, mask=m_inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        if HAS_WEIGHTS:
            weight = tl.load(weights + b * (count * listed) + entry, mask=m_inside, other=0.0).to(tl.float32)
            scores *= weight[:, None]
            grad_p *= weight[:, None]
        scores = _adjust(
            scores, scale, bias, segments,
            other * bias_r + (g * n + m) * (listed * n) + (entry % listed) * n, token, y, x, key_y, key_x,
            m_inside, inside, width, valid_height, valid_width, HAS_BIAS, HAS_SEGMENTS, HAS_VALID,
        )  # fmt: skip
        p = tl.exp2(scores - logarithm[:, None])
        grad_scores = p * (grad_p - product[:, None])
        if HAS_WEIGHTS:
            p *= weight[:, None]
            grad_scores *= weight[:, None]
        accumulated_v += tl.dot(tl.trans(p.to(grads.dtype)), grads, input_precision=PRECISION)
        accumulated_k += tl.dot(tl.trans(grad_scores.to(queries.dtype)), queries, input_precision=PRECISION)
    at = key_y * width + key_x
    _store_rows(grad_k + first * D, at, heads, g, accumulated_k * scale, inside, D, BLOCK_D)
    _store_rows(grad_v + first * D, at, heads, g, accumulated_v, inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _bias_grad_kernel(
    q, k, v, index, bias, segments, weights, q_b, q_h, q_w, q_g, k_b, k_h, k_w, k_g, v_b, v_h, v_w, v_g,
    bias_r, height, width, heads, columns, count, tall, wide, listed, valid_height, valid_width, scale,
    lse, grad, delta, parts, windows, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum of the scores' gradients, for a tile of the bias, over every `splits`-th of the windows that share it."""
    n = tall * wide
    across = tl.cdiv(listed * n, BLOCK_N)
    program = tl.program_id(0)
    split = program % splits
    j = program // splits % across * BLOCK_N + tl.arange(0, BLOCK_N)
    program = program // (splits * across)
    m = program % tl.cdiv(n, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    program = program // tl.cdiv(n, BLOCK_M)  # head, and region where each has its own bias
    g = program % heads
    own = program // heads
    m_inside = m < n
    none = (program * 0).to(tl.int64)  # samples are counted in 64 bits
    accumulated = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in range(split, windows, splits):
        region, b = own, none + window
        if bias_r == 0:
            region, b = window % count, none + window // count
        y, x = _place(region, m, columns, tall, wide)
        at = y * width + x
        first = b * (height * width * heads)
        lists = (b * count + region) * listed
        other, token, place, inside = _listed_keys(index + lists, region, j, listed, n, count, HAS_INDEX)
        key_y, key_x = _place(other, token, columns, tall, wide)
        queries = _load_rows(q + b * q_b + g * q_g, y, x, q_h, q_w, m_inside, D, BLOCK_D)
        grads = _load_dense(grad + first * D, at, heads, g, m_inside, D, BLOCK_D)
        keys = _load_rows(k + b * k_b + g * k_g, key_y, key_x, k_h, k_w, inside, D, BLOCK_D)
        values = _load_rows(v + b * v_b + g * v_g, key_y, key_x, v_h, v_w, inside, D, BLOCK_D)
        logarithm = tl.load(lse + first + at * heads + g, mask=m_inside, other=float("inf"))
        product = tl.load(delta + first + at * heads + g, mask=m_inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        grad_p = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        if HAS_WEIGHTS:
            weight = tl.load(weights + lists + place, mask=inside, other=0.0).to(tl.float32)
            scores *= weight[None, :]
            grad_p *= weight[None, :]
        scores = _adjust(
            scores, scale, bias, segments, region * bias_r + (g * n + m) * (listed * n), j, y, x, key_y, key_x,
            m_inside, inside, width, valid_height, valid_width, HAS_BIAS, HAS_SEGMENTS, HAS_VALID,
        )  # fmt: skip
        accumulated += tl.exp2(scores - logarithm[:, None]) * (grad_p - product[:, None])
    rows = tl.num_programs(0) // (splits * across)  # blocks of rows over all heads and regions
    size = rows // tl.cdiv(n, BLOCK_M) * n * (listed * n)
    at = split.to(tl.int64) * size + program * n * (listed * n) + m[:, None] * (listed * n) + j[None, :]
    tl.store(parts + at, accumulated, mask=m_inside[:, None] & (j < listed * n)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _weights_grad_kernel(
    q, k, v, index, bias, segments, weights, q_b, q_h, q_w, q_g, k_b, k_h, k_w, k_g, v_b, v_h, v_w, v_g,
    bias_r, height, width, heads, columns, count, tall, wide, listed, valid_height, valid_width, scale,
    lse, grad, delta, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head's share of the gradient of one listed region's weight."""
    n = tall * wide
    program = tl.program_id(0)
    g = program % heads
    entry = program // heads  # over samples, regions and their lists
    place = entry % listed
    region = entry // listed % count
    b = (entry // (listed * count)).to(tl.int64)
    weight = tl.load(weights + entry).to(tl.float32)
    summed = tl.zeros([BLOCK_M], tl.float32)
    first = b * (height * width * heads)
    for begin in range(0, n, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        m_inside = m < n
        y, x = _place(region, m, columns, tall, wide)
        at = y * width + x
        queries = _load_rows(q + b * q_b + g * q_g, y, x, q_h, q_w, m_inside, D, BLOCK_D)
        grads = _load_dense(grad + first * D, at, heads, g, m_inside, D, BLOCK_D)
        logarithm = tl.load(lse + first + at * heads + g, mask=m_inside, other=float("inf"))
        product = tl.load(delta + first + at * heads + g, mask=m_inside, other=0.0)
        for start in range(0, n, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            # the list's places before and after this one are not looked at
            other, _, _, inside = _listed_keys(
                index + entry - place, region, place * n + token, listed, n, count, HAS_INDEX
            )
            inside = inside & (token < n)
            key_y, key_x = _place(other, token, columns, tall, wide)
            keys = _load_rows(k + b * k_b + g * k_g, key_y, key_x, k_h, k_w, inside, D, BLOCK_D)
            values = _load_rows(v + b * v_b + g * v_g, key_y, key_x, v_h, v_w, inside, D, BLOCK_D)
            plain = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            plain_grad = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            scores = _adjust(
                plain * weight, scale, bias, segments,
                region * bias_r + (g * n + m) * (listed * n), place * n + token, y, x, key_y, key_x,
                m_inside, inside, width, valid_height, valid_width, HAS_BIAS, HAS_SEGMENTS, HAS_VALID,
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
