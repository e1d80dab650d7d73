"""Triton kernels of score attention, forward and backward: no map of scores is ever held.

Forward a program takes a block of queries over all keys, for one head. Backward one kernel does so for the gradient of
the queries, a second takes a block of keys over all queries; both compute the scores anew. Nothing is summed by
atomics: results are the same from run to run.

"sigmoid" and "relu" look at nothing but the score, so that the backward pass needs no output and no sums. The others
are divided by their sum over the keys; "softplus" and "signed_softmax" are softmax of another exponent than the score,
summed as flash attention does. Weights of "relu" and "taylor", before the division, can pass what float16 holds: there
their products are of tf32, which rounds as float16 does.

Where the GPU has a unit that copies blocks of rows, rows come by descriptors (`visionzoo.kernels.launch.described`):
no thread counts addresses, and rows past the last are zeros. Otherwise by pointers and masks.

Blocks have few sizes; batch and map are plain arguments, so that a new image size compiles nothing new.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels import flops
from visionzoo.kernels.launch import blocks, described, describes, dot_precision, head_block, run, token_rows
from visionzoo.kernels.online_softmax import (
    LOG2_E,
    load_rows,
    program_place,
    round_to_tf32,
    softmax_end,
    softmax_start,
    softmax_step,
    store_rows,
)
from visionzoo.kernels.operator import operator

_SIZES = ["queries", "keys"]  # vary from call to call: the compiler must not look at their values
_WITHOUT_SUM = ("relu", "sigmoid")
_DESCRIBED_FROM = 1024  # tokens; for 256, GPU time is that of pointers, and the host's for descriptors not measured


def forward(q: Tensor, k: Tensor, v: Tensor, *, normalizer: str, scale: float, dtype: torch.dtype) -> Tensor:
    """Attention of [B, H, W, G, D] tensors as `score_attention` says."""
    return _attend(q, k, v, normalizer, float(scale), dtype)[0]


# -- operators --------------------------------------------------------------------------------------------------------


def _sums_shape(q: Tensor, normalizer: str) -> torch.Size | tuple[int, ...]:
    return (0,) if normalizer in _WITHOUT_SUM else q.shape[:4]


def _attend_fake(q, k, v, normalizer, scale, dtype):
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(_sums_shape(q, normalizer), dtype=torch.float32)


def _save(ctx, inputs, output):
    q, k, v, ctx.normalizer, ctx.scale, _ = inputs
    summed = ctx.normalizer not in _WITHOUT_SUM
    ctx.save_for_backward(*(output if summed else (None, None)), q, k, v)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_sums):
    if grad is None:
        return (None,) * 6
    return *_attend_backward(grad, *ctx.saved_tensors, ctx.normalizer, ctx.scale), None, None, None


@operator("score_attention", fake=_attend_fake, save=_save, differentiate=_differentiate, flops=flops.score_attention)
def _attend(
    q: Tensor, k: Tensor, v: Tensor, normalizer: str, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output [B, H, W, G, D] and, for the backward pass, the sums [B, H, W, G] of the weights of a query.

    Of "taylor" these are as they are, of the others in base-2 logarithms; empty where no sum is taken.
    """
    call = _Call(q, k, v, normalizer, scale, dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    sums = torch.empty(_sums_shape(q, normalizer), dtype=torch.float32, device=q.device)
    call.launch(_forward_kernel, "forward", out, sums)
    return out, sums


def _attend_backward_fake(grad, out, sums, q, k, v, normalizer, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


@operator("score_attention_backward", fake=_attend_backward_fake, flops=flops.backward(flops.score_attention, 3))
def _attend_backward(
    grad: Tensor,
    out: Tensor | None,
    sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalizer: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    call = _Call(q, k, v, normalizer, scale, grad.dtype, grad=grad.contiguous())
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = None if sums is None else torch.empty_like(sums)
    call.launch(_query_grad_kernel, "queries", out, sums, delta, grad_q)
    call.launch(_key_grad_kernel, "keys", sums, delta, grad_k, grad_v)
    return grad_q, grad_k, grad_v


class _Sizes(NamedTuple):
    """Blocks of a launch: tokens that a program owns, tokens of a step, and how it is compiled."""

    own: int
    step: int
    warps: int
    stages: int


def _sizes(launch: str, normalizer: str, dtype: torch.dtype, block_d: int, described: bool) -> _Sizes:
    """Blocks for maps that have as many tokens; `launch` is "forward", "queries" or "keys"."""
    if dtype == torch.float32:  # exact products, in ordinary registers
        return _Sizes(32, 32, 4 if block_d <= 64 else 8, 1)
    if normalizer == "sigmoid" and block_d <= 64 and described:
        return {"forward": _Sizes(64, 128, 4, 2), "queries": _Sizes(64, 64, 4, 2), "keys": _Sizes(64, 64, 4, 3)}[launch]
    if launch == "forward":
        return _Sizes(128, 64, 4 if block_d <= 64 else 8, 3)
    return _Sizes(64, 64, 4 if block_d <= 64 else 8, 2)


class _Call:
    """One call's tensors and numbers, in the order in which every kernel takes them."""

    def __init__(self, q, k, v, normalizer, scale, dtype, grad=None):
        (q, q_step), (k, k_step), (v, v_step) = map(token_rows, (q, k, v))
        self.batch, height, width, self.heads, head_dim = q.shape
        self.queries, self.keys, self.dtype = height * width, k.shape[1] * k.shape[2], q.dtype
        self.rows = {"q": (q, q_step), "k": (k, k_step), "v": (v, v_step)}
        if grad is not None:
            self.rows["grad"] = grad, self.heads * head_dim
        self.arguments = q_step, k_step, v_step, self.queries, self.keys, scale
        precision = products = dot_precision(q.dtype)
        if q.dtype == torch.float16 and (normalizer in ("relu", "taylor") or dtype == torch.float32):
            products = "tf32"
        self.options = {
            "NORMALIZER": normalizer,
            "G": self.heads,
            "D": head_dim,
            "BLOCK_D": head_block(head_dim),
            "PRECISION": precision,
            "PRODUCTS": products,
            "WIDE": products != precision,
            "DESCRIBED": min(self.queries, self.keys) >= _DESCRIBED_FROM
            and all(describes(t, step) for t, step in self.rows.values()),
        }

    def launch(self, kernel, name: str, *tensors) -> None:
        """Run a kernel with this call's arguments, then `tensors`."""
        by_descriptors = self.options["DESCRIBED"]
        sizes = _sizes(name, self.options["NORMALIZER"], self.dtype, self.options["BLOCK_D"], by_descriptors)
        shared = 1 if self.dtype == torch.float32 else 4 if name == "forward" and by_descriptors else 2
        count, others = (self.keys, self.queries) if name == "keys" else (self.queries, self.keys)
        own = min(sizes.own, max(16, 1 << (count - 1).bit_length()))
        step = min(sizes.step, max(16, 1 << (others - 1).bit_length()))
        rows = [t for t, _ in self.rows.values()]
        if by_descriptors:
            block = {"k": own, "v": own} if name == "keys" else {"q": own, "grad": own}
            rows = [described(t, s, block.get(which, step)) for which, (t, s) in self.rows.items()]
        run(
            kernel, self.batch * self.heads * blocks(count, own),
            *rows, *self.arguments, *tensors, **self.options, SHARED=shared, OWN=own, STEP=step,
            num_warps=sizes.warps, num_stages=sizes.stages,
        )  # fmt: skip


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _halves(x):
    """Split [rows, columns] into the first and the second half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _whole(first, second):
    """Undo `_halves`."""
    return tl.reshape(tl.permute(tl.join(first, second), [0, 2, 1]), [first.shape[0], 2 * first.shape[1]])


@triton.jit
def _reciprocal(x):
    """1 / x of 1 <= x < 2¹²⁵, without a special function: a guess from the bits, then two of Newton's steps."""
    y = (0x7EF311C7 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    error = 1.0 - x * y
    y += y * (error + error * error)
    return y + y * (1.0 - x * y)


@triton.jit
def _sigmoid(dots, scale, keys, SHARED: tl.constexpr):
    """Sigmoid 1 / (1 + N·e^-s) of scores less log N. SHARED (1, 2 or 4) of them take the reciprocal of one product.

    What limits these kernels are the special functions and the instructions. Two of a product's factors 1 + power are
    never added up by themselves: they are factors of sums. Of two, the reciprocal is the square of a reciprocal root,
    which is a fifth of a division's instructions; of four, it has no special function. So that no product overflows,
    weights below 2⁻⁶⁰ become that of two, and 2⁻³⁰ of four, which is for weights that are only summed.
    """
    exponents = tl.log2(keys.to(tl.float32)) - dots * (scale * LOG2_E)
    if SHARED == 4:
        left, right = _halves(tl.exp2(tl.minimum(exponents, 30.0)))
        a, b = _halves(left)
        c, d = _halves(right)
        b = 1.0 + b
        d = 1.0 + d
        ab = tl.fma(a, b, b)
        cd = tl.fma(c, d, d)
        over = _reciprocal(ab * cd)
        over_ab = cd * over
        over_cd = ab * over
        left = _whole(b * over_ab, tl.fma(a, over_ab, over_ab))
        weights = _whole(left, _whole(d * over_cd, tl.fma(c, over_cd, over_cd)))
    elif SHARED == 2:
        a, b = _halves(tl.exp2(tl.minimum(exponents, 60.0)))
        b = 1.0 + b
        over = tl.rsqrt(tl.fma(a, b, b))
        over *= over
        weights = _whole(b * over, tl.fma(a, over, over))
    else:
        weights = 1.0 / (1.0 + tl.exp2(exponents))
    return weights


@triton.jit
def _taylor(dots, scale):
    """1 + s + s²/2."""
    scores = dots * scale
    return 1.0 + scores * (1.0 + 0.5 * scores)


@triton.jit
def _softplus(scores):
    """Softplus of scores that are not far below 0: max(s, 0) + log(1 + e^-|s|)."""
    power = tl.exp2(-tl.abs(scores) * LOG2_E)
    # log(1 + x) = 2·artanh(x / (2 + x)), whose series is exact to float32 up to x = 1, and for tiny x as well
    z = power / (2.0 + power)
    square = z * z
    series = 1 / 13 + square * (1 / 15)
    series = 1 / 9 + square * (1 / 11 + square * series)
    series = 1 / 5 + square * (1 / 7 + square * series)
    series = 1.0 + square * (1 / 3 + square * series)
    return tl.maximum(scores, 0.0) + 2.0 * z * series


@triton.jit
def _exponents(dots, scale, NORMALIZER: tl.constexpr):
    """Base-2 logarithms of the weights without their sign, before the division."""
    scores = dots * scale
    if NORMALIZER == "softplus":
        # of scores far below 0: s - e^s / 2, which is the scores themselves in float32
        exponents = tl.where(scores < -20.0, scores * LOG2_E, tl.log2(_softplus(tl.maximum(scores, -20.0))))
    else:
        exponents = tl.abs(scores) * LOG2_E
    return exponents


@triton.jit
def _signs(dots):
    """-1, 0 or 1."""
    return (dots > 0.0).to(tl.float32) - (dots < 0.0).to(tl.float32)


@triton.jit
def _factor(x, like, WIDE: tl.constexpr):
    """Round numbers to a factor of a matrix product with rows of some dtype."""
    if WIDE:
        return round_to_tf32(x.to(tl.float32))
    else:
        return x.to(like.dtype)


@triton.jit
def _load(
    rows, b, g, start, count, step,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Load [ROWS, D] rows from `start` of head g of sample b, zeros past `count`; WIDE are factors with weights."""
    if DESCRIBED:
        loaded = tl.reshape(rows.load([b.to(tl.int32), start, g * D]), [ROWS, BLOCK_D])
    else:
        at = start + tl.arange(0, ROWS)
        loaded = load_rows(rows + b * count * step + g * D, at, step, at < count, D, BLOCK_D)
    if WIDE:
        loaded = round_to_tf32(loaded.to(tl.float32))
    return loaded


@triton.jit
def _weights_and_grad_scores(dots, projected, sums, delta, scale, keys, NORMALIZER: tl.constexpr, SHARED: tl.constexpr):
    """Weights, and gradients of scores (but for the scale) of the values' products with the output's gradient.

    `sums` and `delta` belong to the queries and are shaped to go with `dots`.
    """
    if NORMALIZER == "sigmoid":
        weights = _sigmoid(dots, scale, keys, SHARED)
        grad_scores = (weights - weights * weights) * projected
    elif NORMALIZER == "relu":
        weights = tl.maximum(dots * scale, 0.0)
        grad_scores = tl.where(dots * scale > 0.0, projected, 0.0)
    elif NORMALIZER == "taylor":
        over = 1.0 / sums
        weights = _taylor(dots, scale) * over
        grad_scores = (1.0 + dots * scale) * over * (projected - delta)
    else:
        weights = tl.exp2(_exponents(dots, scale, NORMALIZER) - sums)
        if NORMALIZER == "softplus":
            # the exponent's slope, sigmoid over softplus
            scores = tl.maximum(dots * scale, -20.0)
            slope = 1.0 / ((1.0 + tl.exp2(-scores * LOG2_E)) * _softplus(scores))
            grad_scores = weights * slope * (projected - delta)
        else:
            signs = _signs(dots * scale)
            grad_scores = weights * signs * (signs * projected - delta)
            weights *= signs
    return weights, grad_scores


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q, k, v, q_step, k_step, v_step, queries, keys, scale, out, sums,
    NORMALIZER: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    PRODUCTS: tl.constexpr, WIDE: tl.constexpr, SHARED: tl.constexpr, DESCRIBED: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Weighted sums of the values for a block of queries."""
    exponential: tl.constexpr = NORMALIZER == "softplus" or NORMALIZER == "signed_softmax"
    g, _, block, b = program_place(tl.program_id(0), 1, tl.cdiv(queries, OWN), G)
    m = block * OWN + tl.arange(0, OWN)
    m_inside = m < queries
    some_queries = _load(q, b, g, block * OWN, queries, q_step, OWN, D, BLOCK_D, False, DESCRIBED)
    highest, total, accumulated = softmax_start(OWN, BLOCK_D)
    for start in range(0, keys, STEP):
        inside = start + tl.arange(0, STEP) < keys
        some_keys = _load(k, b, g, start, keys, k_step, STEP, D, BLOCK_D, False, DESCRIBED)
        values = _load(v, b, g, start, keys, v_step, STEP, D, BLOCK_D, WIDE, DESCRIBED)
        dots = tl.dot(some_queries, tl.trans(some_keys), input_precision=PRECISION)
        # values of keys that do not exist are 0; only in the sums their weights would count
        if exponential:
            exponents = tl.where(inside[None, :], _exponents(dots, scale, NORMALIZER), float("-inf"))
            weights, highest, total, accumulated = softmax_step(exponents, highest, total, accumulated)
            if NORMALIZER == "signed_softmax":
                weights *= _signs(dots * scale)
        elif NORMALIZER == "taylor":
            weights = tl.where(inside[None, :], _taylor(dots, scale), 0.0)
            total += tl.sum(weights, 1)
        elif NORMALIZER == "sigmoid":
            weights = _sigmoid(dots, scale, keys, SHARED)
        else:
            weights = tl.maximum(dots * scale, 0.0)
        accumulated += tl.dot(_factor(weights, values, WIDE), values, input_precision=PRODUCTS)
    if exponential:
        accumulated, total = softmax_end(highest, total, accumulated)
    elif NORMALIZER == "taylor":
        accumulated = accumulated / total[:, None]
    first = b * queries * G + g
    store_rows(out + first * D, m, G * D, accumulated, m_inside, D, BLOCK_D)
    if exponential or NORMALIZER == "taylor":
        tl.store(sums + first + m * G, total, mask=m_inside)


@triton.jit(do_not_specialize=_SIZES)
def _query_grad_kernel(
    q, k, v, grad, q_step, k_step, v_step, queries, keys, scale, out, sums, delta, grad_q,
    NORMALIZER: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    PRODUCTS: tl.constexpr, WIDE: tl.constexpr, SHARED: tl.constexpr, DESCRIBED: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries, and `delta`, the product of output and its gradient, for the other kernel."""
    g, _, block, b = program_place(tl.program_id(0), 1, tl.cdiv(queries, OWN), G)
    first = b * queries * G + g
    m = block * OWN + tl.arange(0, OWN)
    m_inside = m < queries
    some_queries = _load(q, b, g, block * OWN, queries, q_step, OWN, D, BLOCK_D, False, DESCRIBED)
    grads = _load(grad, b, g, block * OWN, queries, G * D, OWN, D, BLOCK_D, False, DESCRIBED)
    total, product = None, None
    if sums is not None:
        outs = load_rows(out + first * D, m, G * D, m_inside, D, BLOCK_D)
        product = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
        tl.store(delta + first + m * G, product, mask=m_inside)
        product = product[:, None]
        total = tl.load(sums + first + m * G, mask=m_inside, other=1.0)[:, None]
    grads = _factor(grads, some_queries, WIDE)
    accumulated = tl.zeros([OWN, BLOCK_D], tl.float32)
    for start in range(0, keys, STEP):
        some_keys = _load(k, b, g, start, keys, k_step, STEP, D, BLOCK_D, False, DESCRIBED)
        values = _load(v, b, g, start, keys, v_step, STEP, D, BLOCK_D, WIDE, DESCRIBED)
        dots = tl.dot(some_queries, tl.trans(some_keys), input_precision=PRECISION)
        projected = tl.dot(grads, tl.trans(values), input_precision=PRODUCTS)
        _weights, grad_scores = _weights_and_grad_scores(
            dots, projected, total, product, scale, keys, NORMALIZER, SHARED
        )
        if WIDE:
            some_keys = some_keys.to(tl.float32)
        accumulated += tl.dot(_factor(grad_scores, some_keys, WIDE), some_keys, input_precision=PRODUCTS)
    store_rows(grad_q + first * D, m, G * D, accumulated * scale, m_inside, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _key_grad_kernel(
    q, k, v, grad, q_step, k_step, v_step, queries, keys, scale, sums, delta, grad_k, grad_v,
    NORMALIZER: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    PRODUCTS: tl.constexpr, WIDE: tl.constexpr, SHARED: tl.constexpr, DESCRIBED: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values; scores are [keys, queries] here."""
    g, _, block, b = program_place(tl.program_id(0), 1, tl.cdiv(keys, OWN), G)
    n = block * OWN + tl.arange(0, OWN)
    inside = n < keys
    some_keys = _load(k, b, g, block * OWN, keys, k_step, OWN, D, BLOCK_D, False, DESCRIBED)
    values = _load(v, b, g, block * OWN, keys, v_step, OWN, D, BLOCK_D, WIDE, DESCRIBED)
    accumulated_k = tl.zeros([OWN, BLOCK_D], tl.float32)
    accumulated_v = tl.zeros([OWN, BLOCK_D], tl.float32)
    for start in range(0, queries, STEP):
        m = start + tl.arange(0, STEP)
        m_inside = m < queries
        some_queries = _load(q, b, g, start, queries, q_step, STEP, D, BLOCK_D, False, DESCRIBED)
        grads = _load(grad, b, g, start, queries, G * D, STEP, D, BLOCK_D, False, DESCRIBED)
        grads = _factor(grads, some_queries, WIDE)
        if sums is not None:
            at = b * queries * G + g + m * G
            total = tl.load(sums + at, mask=m_inside, other=1.0)[None, :]
            product = tl.load(delta + at, mask=m_inside, other=0.0)[None, :]
        else:
            total, product = None, None
        dots = tl.dot(some_keys, tl.trans(some_queries), input_precision=PRECISION)
        projected = tl.dot(values, tl.trans(grads), input_precision=PRODUCTS)
        weights, grad_scores = _weights_and_grad_scores(
            dots, projected, total, product, scale, keys, NORMALIZER, SHARED
        )
        accumulated_v += tl.dot(_factor(weights, some_queries, WIDE), grads, input_precision=PRODUCTS)
        if WIDE:
            some_queries = some_queries.to(tl.float32)
        accumulated_k += tl.dot(_factor(grad_scores, some_queries, WIDE), some_queries, input_precision=PRODUCTS)
    first = (b * keys * G + g) * D
    store_rows(grad_k + first, n, G * D, accumulated_k * scale, inside, D, BLOCK_D)
    store_rows(grad_v + first, n, G * D, accumulated_v, inside, D, BLOCK_D)
