"""Triton kernels of linear attention, forward and backward; every tensor is read where it lies, features are never stored.

Three launches forward: programs that own a part of the keys sum φ(k) vᵀ and φ(k) over it, in float32; the parts are
summed; programs that own a block of queries apply the sums. Three more backward: over queries (their gradient, and
parts of the gradient of the sums), the sum of the parts, and over keys. A program takes several heads of its tokens,
one after the other, because lengths of "focused" features span all heads. Nothing is summed by atomics: results are
the same from run to run.

What all queries need to know of the keys, the "state" of a head, is a float32 [D + 3, D] padded to the block's width:
the mean of φ(k) vᵀ; then the mean of φ(k); then, for "softmax", the largest key of each channel and the number that
makes features of exponentials. Its gradient has the same layout, without the last two rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels.launch import dense_rows, dot_precision, head_block, row_strides

_LOG2_E = tl.constexpr(1.4426950408889634)
_EXTRA = tl.constexpr(3)  # rows of a state behind the D of Σ φ(k) vᵀ
_KEPT = tl.constexpr(4)  # numbers of a token that a program notes between its passes over the heads
# arguments that vary with batch and image: the compiler must not look at their values
_SIZES = ["width", "tokens", "keys", "splits", "steps", "groups"]
_PROGRAMS = 1024  # that a launch should have where it can: several for each of a large GPU's processors


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str,
    focusing_factor: float,
    temperature: Tensor | None,
    eps: float,
) -> Tensor:
    """Attention of [B, H, W, G, D] tensors as `linear_attention` says."""
    return _attend(q, k, v, temperature, feature_map, float(focusing_factor), float(eps))[0]


# -- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("visionzoo::linear_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, feature_map: str, factor: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, W, G, D] and, for the backward pass, the state [B, G, D + 3, D] of the keys."""
    call = _Call(q, k, v, temperature, feature_map, factor, eps)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    plan = call.keys
    parts = call.states(plan.splits)
    call.launch(_state_kernel, plan, call.k, call.v, *row_strides(call.k, call.v), plan.notes(), parts)
    state = call.sum_parts(parts, parts, backward=False)
    plan = call.queries.single()
    call.launch(_output_kernel, plan, call.q, *row_strides(call.q), state, eps, out)
    return out, state


@torch.library.custom_op("visionzoo::linear_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | None,
    feature_map: str,
    factor: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and temperature; the last is empty where there is none."""
    call = _Call(q, k, v, temperature, feature_map, factor, eps)
    grad = grad.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    of_queries, of_keys = call.queries, call.keys.single()
    shares = call.temperature_shares(of_queries.parts, of_keys.parts)
    parts = call.states(of_queries.splits)
    call.launch(
        _query_grad_kernel, of_queries, call.q, *row_strides(call.q), grad, state, eps, of_queries.notes(),
        grad_q, parts, shares[0],
    )  # fmt: skip
    grad_state = call.sum_parts(parts, state, backward=True)
    call.launch(
        _key_grad_kernel, of_keys, call.k, call.v, *row_strides(call.k, call.v), state, grad_state,
        grad_k, grad_v, shares[1],
    )  # fmt: skip
    grad_temperature = q.new_empty(0)
    if temperature is not None:
        summed = sum(share.sum((0, 1)) for share in shares)
        grad_temperature = (summed / -temperature).to(temperature.dtype)
    return grad_q, grad_k, grad_v, grad_temperature


@_attend.register_fake
def _(q, k, v, temperature, feature_map, factor, eps):
    block = head_block(q.shape[-1])
    state = q.new_empty((q.shape[0], q.shape[3], block + _EXTRA.value, block), dtype=torch.float32)
    return q.new_empty(q.shape), state


@_attend_backward.register_fake
def _(grad, state, q, k, v, temperature, feature_map, factor, eps):
    none = q.new_empty(0)
    grads = (t.new_empty(t.shape) for t in (q, k, v))
    return (*grads, none if temperature is None else temperature.new_empty(temperature.shape))


def _save(ctx, inputs, output):
    q, k, v, temperature, ctx.feature_map, ctx.factor, ctx.eps = inputs
    ctx.save_for_backward(output[1], q, k, v, temperature)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_state):
    if grad is None:
        return (None,) * 7
    *grads, grad_temperature = _attend_backward(grad, *ctx.saved_tensors, ctx.feature_map, ctx.factor, ctx.eps)
    return (*grads, grad_temperature if ctx.needs_input_grad[3] else None, None, None, None)


_attend.register_autograd(_differentiate, setup_context=_save)


class _Plan:
    """How programs share the tokens [B, H, W] of queries or of keys.

    A program takes `steps` blocks of one of `splits` parts of a sample's tokens and one of `groups` groups of heads:
    few parts, since each has its own sums, but enough programs for a GPU.
    """

    def __init__(self, x: Tensor, block: int, steps: int | None = None):
        self.x, self.block = x, block
        batch, height, self.width, heads, _ = x.shape
        self.tokens = height * self.width
        blocks = triton.cdiv(self.tokens, block)
        self.steps = max(1, min(blocks, batch * blocks // _PROGRAMS)) if steps is None else steps
        self.splits = triton.cdiv(blocks, self.steps)
        share = max(1, heads * batch * self.splits // _PROGRAMS)  # heads of a program
        self.groups = triton.cdiv(heads, min(heads, share))
        self.parts = (batch, self.splits)
        self.programs = batch * self.splits * self.groups

    def single(self) -> _Plan:
        """Return the same tokens with one block for a program."""
        return _Plan(self.x, self.block, 1)

    def notes(self) -> Tensor:
        """Room for what programs note of each token between their passes over the heads."""
        size = self.x.shape[0] * self.groups * _KEPT.value * self.tokens
        return torch.empty(size, dtype=torch.float32, device=self.x.device)


class _Call:
    """One call's tensors, and what all its kernels share."""

    def __init__(self, q, k, v, temperature, feature_map, factor, eps):
        self.q, self.k, self.v = (dense_rows(t) for t in (q, k, v))
        self.temperature = None if temperature is None else temperature.contiguous()
        self.factor = factor
        self.heads, head_dim = q.shape[3:]
        self.block_d = head_block(head_dim)
        precision = dot_precision(q.dtype)
        exact = precision
        if q.dtype != torch.float32:
            # Features and sums are float32. In tf32 they lose as much as in float16, and less than in bfloat16.
            precision = "tf32" if q.dtype == torch.bfloat16 else "tf32x3"
            exact = "tf32x3"
        rows = max(16, min(128, (2048 if precision == "ieee" else 4096) // self.block_d))
        self.queries, self.keys = (_Plan(t, _block(t.shape[1] * t.shape[2], rows)) for t in (q, k))
        self.options = {
            "D": head_dim,
            "BLOCK_D": self.block_d,
            "MAP": feature_map,
            "POWER": int(factor) if factor in range(1, 9) else -1,
            "HAS_TEMPERATURE": temperature is not None,
            "PRECISION": precision,
            "EXACT": exact,
        }

    def launch(self, kernel, plan: _Plan, *tensors) -> None:
        """Run a kernel over the tokens of a plan."""
        temperature = self.q if self.temperature is None else self.temperature  # a pointer that is not read
        kernel[(plan.programs,)](
            *tensors, temperature, self.factor, plan.width, plan.tokens, self.heads, plan.splits, plan.steps,
            plan.groups, **self.options, BLOCK_N=plan.block, num_warps=8 if self.block_d == 128 else 4, num_stages=1,
        )  # fmt: skip

    def states(self, splits: int) -> Tensor:
        """Room for the parts of states."""
        shape = (self.q.shape[0], splits, self.heads, self.block_d + _EXTRA.value, self.block_d)
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def sum_parts(self, parts: Tensor, state: Tensor, backward: bool) -> Tensor:
        """Sum states, or their gradients, [B, splits, G, D + 3, D] over their parts."""
        batch, splits, heads, _, block = parts.shape
        summed = torch.empty((batch, *parts.shape[2:]), dtype=torch.float32, device=parts.device)
        _sum_kernel[(batch * heads * block,)](
            parts, state, summed, heads, splits, self.keys.tokens, BLOCK_D=block, BLOCK_S=32, BACKWARD=backward,
            MAP=self.options["MAP"], num_warps=max(1, block // 32),
        )  # fmt: skip
        return summed

    def temperature_shares(self, *parts: tuple[int, int]) -> list[Tensor]:
        """Room for the shares [..., G, D] of programs in the temperature's gradient."""
        if self.temperature is None:
            return [self.q] * len(parts)  # pointers that are not written
        size = self.temperature.shape
        return [torch.empty((*part, *size), dtype=torch.float32, device=self.q.device) for part in parts]


def _block(tokens: int, most: int) -> int:
    """Rows of blocks of tokens: a power of two from 16 to `most`, so that few kernels are ever compiled."""
    return min(most, max(16, triton.next_power_of_2(tokens)))


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _program(heads, splits, groups):
    """First and last head, split, number among all groups of heads, and sample of this program."""
    program = tl.program_id(0)
    group = program % groups
    split = program // groups % splits
    b = (program // (groups * splits)).to(tl.int64)
    share = tl.cdiv(heads, groups)
    return group * share, tl.minimum(heads, (group + 1) * share), split, b * groups + group, b


@triton.jit
def _load_rows(pointer, n, g, stride_h, stride_w, stride_g, width, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [tokens, D] of one head and sample in float32, zeros where there are no tokens."""
    d = tl.arange(0, BLOCK_D)
    at = pointer + g * stride_g + (n // width * stride_h + n % width * stride_w)[:, None] + d[None, :]
    return tl.load(at, mask=(n < tokens)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_dense(pointer, n, g, heads, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read what `_store_dense` writes, in float32."""
    d = tl.arange(0, BLOCK_D)
    at = pointer + ((n * heads + g) * D)[:, None] + d[None, :]
    return tl.load(at, mask=(n < tokens)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_dense(pointer, n, g, heads, tokens, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows [tokens, D] of a head into one sample of a contiguous [B, H, W, G, D]."""
    d = tl.arange(0, BLOCK_D)
    at = pointer + ((n * heads + g) * D)[:, None] + d[None, :]
    tl.store(at, rows.to(pointer.dtype.element_ty), mask=(n < tokens)[:, None] & (d < D)[None, :])


@triton.jit
def _load_state(state, index, BLOCK_D: tl.constexpr):
    """Sum of φ(k) vᵀ and of φ(k) of the state number `index`, or gradients of them."""
    d = tl.arange(0, BLOCK_D)
    state += index * ((BLOCK_D + _EXTRA) * BLOCK_D)
    return tl.load(state + d[:, None] * BLOCK_D + d[None, :]), tl.load(state + BLOCK_D * BLOCK_D + d)


@triton.jit
def _store_state(state, index, products, totals, BLOCK_D: tl.constexpr):
    """Write what `_load_state` reads."""
    d = tl.arange(0, BLOCK_D)
    state += index * ((BLOCK_D + _EXTRA) * BLOCK_D)
    tl.store(state + d[:, None] * BLOCK_D + d[None, :], products)
    tl.store(state + BLOCK_D * BLOCK_D + d, totals)


@triton.jit
def _inverse_temperature(temperature, g, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_TEMPERATURE: tl.constexpr):
    """1 / temperature of a head, [D]."""
    d = tl.arange(0, BLOCK_D)
    if HAS_TEMPERATURE:
        return 1.0 / tl.load(temperature + g * D + d, mask=d < D, other=1.0).to(tl.float32)
    else:
        return tl.full([BLOCK_D], 1.0, tl.float32)


@triton.jit
def _power(x, exponent, POWER: tl.constexpr):
    """x^POWER by products, or x^exponent where POWER is negative."""
    if POWER < 0:
        return tl.exp2(exponent * tl.log2(tl.maximum(x, 1e-30)))
    else:
        y = tl.full(x.shape, 1.0, tl.float32)
        for _ in tl.static_range(POWER):
            y *= x
        return y


@triton.jit
def _positive(x, keep, inverse_temperature):
    """The t of "focused" features, zero where nothing is to be kept."""
    return tl.where(keep, (tl.maximum(x, 0.0) + 1e-6) * inverse_temperature[None, :], 0.0)


@triton.jit
def _lengths(
    x, n, stride_h, stride_w, stride_g, temperature, factor, width, tokens, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, POWER: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """What "focused" features of tokens depend on over all heads.

    Powers are taken of t / max t, since those of the numbers themselves overflow: returns 1 / max t, and the sums of
    squares of t / max t and of its power.
    """
    d = tl.arange(0, BLOCK_D)
    keep = (n < tokens)[:, None] & (d < D)[None, :]
    largest = tl.full([BLOCK_N], 1e-30, tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    powers = tl.zeros([BLOCK_N], tl.float32)
    for g in range(0, heads):
        rows = _load_rows(x, n, g, stride_h, stride_w, stride_g, width, tokens, D, BLOCK_D)
        t = _positive(rows, keep, _inverse_temperature(temperature, g, D, BLOCK_D, HAS_TEMPERATURE))
        new_largest = tl.maximum(largest, tl.max(t, 1))
        inverse = 1.0 / new_largest
        t *= inverse[:, None]
        shrink = largest * inverse
        shrunk_power = _power(shrink, factor, POWER)
        power = tl.where(keep, _power(t, factor, POWER), 0.0)
        squares = squares * (shrink * shrink) + tl.sum(t * t, 1)
        powers = powers * (shrunk_power * shrunk_power) + tl.sum(power * power, 1)
        largest = new_largest
    inside = n < tokens
    return 1.0 / largest, tl.where(inside, squares, 1.0), tl.where(inside, powers, 1.0)


@triton.jit
def _note(notes, number, n, tokens, a, b, c, d):
    """Keep four numbers of each token for this program's next pass over the heads."""
    at = notes + number * (_KEPT * tokens) + n
    inside = n < tokens
    tl.store(at, a, mask=inside)
    tl.store(at + tokens, b, mask=inside)
    tl.store(at + 2 * tokens, c, mask=inside)
    tl.store(at + 3 * tokens, d, mask=inside)


@triton.jit
def _noted(notes, number, n, tokens):
    """Read what `_note` kept."""
    at = notes + number * (_KEPT * tokens) + n
    inside = n < tokens
    a = tl.load(at, mask=inside, other=1.0)
    b = tl.load(at + tokens, mask=inside, other=1.0)
    c = tl.load(at + 2 * tokens, mask=inside, other=1.0)
    return a, b, c, tl.load(at + 3 * tokens, mask=inside, other=0.0)


@triton.jit
def _features(
    x, keep, inverse_temperature, inverse, squares, powers, factor, MAP: tl.constexpr, POWER: tl.constexpr
):  # fmt: skip
    """φ of rows [tokens, D]; "softmax" as for queries."""
    if MAP == "relu":
        features = tl.maximum(x, 0.0)
    elif MAP == "elu":
        features = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == "softmax":
        x = tl.where(keep, x, -1e30)
        features = tl.exp2((x - tl.max(x, 1)[:, None]) * _LOG2_E)
        features = features / tl.sum(features, 1)[:, None]
    else:
        t = _positive(x, keep, inverse_temperature) * inverse[:, None]
        features = _power(t, factor, POWER) * (tl.sqrt(squares / powers) / inverse)[:, None]
    return tl.where(keep, features, 0.0)


@triton.jit
def _grad_input(
    x, features, grad, keep, inverse_temperature, inverse, squares, powers, projection, factor,
    MAP: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Gradient of x from that of its features, and the product of t and its gradient, of "focused" features.

    `projection` is the sum over all heads of the products of features and their gradients.
    """
    if MAP == "relu":
        return tl.where(x > 0.0, grad, 0.0), grad
    elif MAP == "elu":
        return tl.where(x > 0.0, grad, grad * features), grad
    elif MAP == "softmax":
        return features * (grad - tl.sum(features * grad, 1)[:, None]), grad
    else:
        t = _positive(x, keep, inverse_temperature) * inverse[:, None]
        slope = _power(t, factor - 1.0, POWER - 1 if POWER > 0 else POWER)
        radial = 1.0 / squares[:, None] - factor * slope * slope / powers[:, None]
        grad_t = (factor * tl.sqrt(squares / powers))[:, None] * slope * grad
        grad_t += (projection * inverse)[:, None] * t * radial
        return tl.where(x > 0.0, grad_t * inverse_temperature[None, :], 0.0), grad_t * t / inverse[:, None]


@triton.jit(do_not_specialize=_SIZES)
def _state_kernel(
    k, v, k_b, k_h, k_w, k_g, v_b, v_h, v_w, v_g, notes, parts,
    temperature, factor, width, tokens, heads, splits, steps, groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MAP: tl.constexpr, POWER: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """States of some heads, over one part of the keys."""
    first_head, last_head, split, number, b = _program(heads, splits, groups)
    begin = split * (steps * BLOCK_N)
    end = tl.minimum(tokens, begin + steps * BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k += b * k_b
    v += b * v_b
    if MAP == "focused":
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inverse, squares, powers = _lengths(
                k, n, k_h, k_w, k_g, temperature, factor, width, tokens, heads,
                D, BLOCK_D, BLOCK_N, POWER, HAS_TEMPERATURE,
            )  # fmt: skip
            _note(notes, number, n, tokens, inverse, squares, powers, inverse)
        tl.debug_barrier()  # other threads of this program read the notes
    for g in range(first_head, last_head):
        inverse_temperature = _inverse_temperature(temperature, g, D, BLOCK_D, HAS_TEMPERATURE)
        highest = tl.full([BLOCK_D], -1e30, tl.float32)
        products = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
        totals = tl.zeros([BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            keep = (n < tokens)[:, None] & (d < D)[None, :]
            keys = _load_rows(k, n, g, k_h, k_w, k_g, width, tokens, D, BLOCK_D)
            values = _load_rows(v, n, g, v_h, v_w, v_g, width, tokens, D, BLOCK_D)
            if MAP == "softmax":  # of each channel over all tokens
                keys = tl.where(keep, keys, float("-inf"))
                new_highest = tl.maximum(highest, tl.max(keys, 0))
                rescale = tl.exp2((highest - new_highest) * _LOG2_E)
                features = tl.exp2((keys - new_highest[None, :]) * _LOG2_E)
                products *= rescale[:, None]
                totals *= rescale
                highest = new_highest
            elif MAP == "focused":
                inverse, squares, powers, _ = _noted(notes, number, n, tokens)
                features = _features(keys, keep, inverse_temperature, inverse, squares, powers, factor, MAP, POWER)
            else:
                features = _features(keys, keep, inverse_temperature, d, d, d, factor, MAP, POWER)
            products += tl.dot(tl.trans(features), values, input_precision=PRECISION)
            totals += tl.sum(features, 0)
        index = (b * splits + split) * heads + g
        _store_state(parts, index, products, totals, BLOCK_D)
        if MAP == "softmax":
            tl.store(parts + (index * (BLOCK_D + _EXTRA) + BLOCK_D + 1) * BLOCK_D + d, highest)


@triton.jit(do_not_specialize=_SIZES)
def _sum_kernel(
    parts, state, summed, heads, splits, keys,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BACKWARD: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """One row of a state, or of its gradient, from all parts, over the number of keys."""
    row = tl.program_id(0) % BLOCK_D
    number = tl.program_id(0) // BLOCK_D
    b = (number // heads).to(tl.int64)
    size = (BLOCK_D + _EXTRA) * BLOCK_D
    parts += (b * splits * heads + number % heads) * size
    out = summed + number.to(tl.int64) * size
    d = tl.arange(0, BLOCK_D)
    NORMALISE: tl.constexpr = MAP == "softmax" and not BACKWARD
    highest = -1e30
    if NORMALISE:
        for start in range(0, splits, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            at = parts + s * (heads * size) + (BLOCK_D + 1) * BLOCK_D + row
            highest = tl.maximum(highest, tl.max(tl.load(at, mask=s < splits, other=-1e30), 0))
    products = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = parts + s * (heads * size)
        some = tl.load(at[:, None] + row * BLOCK_D + d[None, :], mask=(s < splits)[:, None], other=0.0)
        totals = tl.load(at + BLOCK_D * BLOCK_D + row, mask=s < splits, other=0.0)
        if NORMALISE:
            own = tl.load(at + (BLOCK_D + 1) * BLOCK_D + row, mask=s < splits, other=-1e30)
            weight = tl.exp2((own - highest) * _LOG2_E)
            some *= weight[:, None]
            totals *= weight
        products += tl.sum(some, 0)
        total += tl.sum(totals, 0)
    if NORMALISE:
        total = tl.where(total > 0.0, total, 1.0)  # channels of the padding have none
        tl.store(out + row * BLOCK_D + d, products / total)
        tl.store(out + BLOCK_D * BLOCK_D + row, 1.0)
        tl.store(out + (BLOCK_D + 1) * BLOCK_D + row, highest)
        tl.store(out + (BLOCK_D + 2) * BLOCK_D + row, keys / total)
    else:
        products = products / keys
        total = total / keys
        if MAP == "softmax":  # the share of the softmax's denominator in the gradient; that of the totals vanishes
            total = -tl.sum(products * tl.load(state + number.to(tl.int64) * size + row * BLOCK_D + d), 0)
        tl.store(out + row * BLOCK_D + d, products)
        tl.store(out + BLOCK_D * BLOCK_D + row, total)


@triton.jit(do_not_specialize=_SIZES)
def _output_kernel(
    q, q_b, q_h, q_w, q_g, state, eps, out,
    temperature, factor, width, tokens, heads, splits, steps, groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MAP: tl.constexpr, POWER: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some heads of a block of queries."""
    first_head, last_head, block, _, b = _program(heads, splits, groups)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    keep = (n < tokens)[:, None] & (d < D)[None, :]
    q += b * q_b
    inverse, squares, powers = d, d, d
    if MAP == "focused":
        inverse, squares, powers = _lengths(
            q, n, q_h, q_w, q_g, temperature, factor, width, tokens, heads,
            D, BLOCK_D, BLOCK_N, POWER, HAS_TEMPERATURE,
        )  # fmt: skip
    for g in range(first_head, last_head):
        inverse_temperature = _inverse_temperature(temperature, g, D, BLOCK_D, HAS_TEMPERATURE)
        queries = _load_rows(q, n, g, q_h, q_w, q_g, width, tokens, D, BLOCK_D)
        features = _features(queries, keep, inverse_temperature, inverse, squares, powers, factor, MAP, POWER)
        products, means = _load_state(state, b * heads + g, BLOCK_D)
        total = tl.sum(features * means[None, :], 1) + eps
        rows = tl.dot(features, products, input_precision=PRECISION) / total[:, None]
        _store_dense(out + b * (tokens * heads * D), n, g, heads, tokens, rows, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _query_grad_kernel(
    q, q_b, q_h, q_w, q_g, grad, state, eps, notes, grad_q, parts, shares,
    temperature, factor, width, tokens, heads, splits, steps, groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MAP: tl.constexpr, POWER: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of some heads of one part of the queries, and this part's share in those of state and temperature."""
    first_head, last_head, split, number, b = _program(heads, splits, groups)
    begin = split * (steps * BLOCK_N)
    end = tl.minimum(tokens, begin + steps * BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q += b * q_b
    grad += b * (tokens * heads * D)
    grad_q += b * (tokens * heads * D)
    if MAP == "focused":
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            keep = (n < tokens)[:, None] & (d < D)[None, :]
            inverse, squares, powers = _lengths(
                q, n, q_h, q_w, q_g, temperature, factor, width, tokens, heads,
                D, BLOCK_D, BLOCK_N, POWER, HAS_TEMPERATURE,
            )  # fmt: skip
            projection = tl.zeros([BLOCK_N], tl.float32)
            for g in range(0, heads):
                inverse_temperature = _inverse_temperature(temperature, g, D, BLOCK_D, HAS_TEMPERATURE)
                queries = _load_rows(q, n, g, q_h, q_w, q_g, width, tokens, D, BLOCK_D)
                grads = _load_dense(grad, n, g, heads, tokens, D, BLOCK_D)
                features = _features(queries, keep, inverse_temperature, inverse, squares, powers, factor, MAP, POWER)
                products, means = _load_state(state, b * heads + g, BLOCK_D)
                total = tl.sum(features * means[None, :], 1) + eps
                rows = tl.dot(features, products, input_precision=PRECISION)
                # φ(q) and its gradient are orthogonal but for eps
                projection += tl.sum(rows * grads, 1) * eps / (total * total)
            _note(notes, number, n, tokens, inverse, squares, powers, projection)
        tl.debug_barrier()  # other threads of this program read the notes
    for g in range(first_head, last_head):
        inverse_temperature = _inverse_temperature(temperature, g, D, BLOCK_D, HAS_TEMPERATURE)
        products, means = _load_state(state, b * heads + g, BLOCK_D)
        grad_products = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
        grad_totals = tl.zeros([BLOCK_D], tl.float32)
        share = tl.zeros([BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            keep = (n < tokens)[:, None] & (d < D)[None, :]
            inverse, squares, powers, projection = d, d, d, d
            if MAP == "focused":
                inverse, squares, powers, projection = _noted(notes, number, n, tokens)
            queries = _load_rows(q, n, g, q_h, q_w, q_g, width, tokens, D, BLOCK_D)
            grads = _load_dense(grad, n, g, heads, tokens, D, BLOCK_D)
            features = _features(queries, keep, inverse_temperature, inverse, squares, powers, factor, MAP, POWER)
            over_total = 1.0 / (tl.sum(features * means[None, :], 1) + eps)
            # values of nearly one mean leave small differences of large numbers here
            grad_features = tl.dot(grads, tl.trans(products), input_precision=EXACT)
            grad_total = -tl.sum(grad_features * features, 1) * over_total * over_total
            grad_features = grad_features * over_total[:, None] + grad_total[:, None] * means[None, :]
            grad_products += tl.dot(tl.trans(features * over_total[:, None]), grads, input_precision=PRECISION)
            grad_totals += tl.sum(features * grad_total[:, None], 0)
            rows, of_temperature = _grad_input(
                queries, features, grad_features, keep, inverse_temperature, inverse, squares, powers, projection, factor,
                MAP, POWER,
            )  # fmt: skip
            _store_dense(grad_q, n, g, heads, tokens, rows, D, BLOCK_D)
            if HAS_TEMPERATURE:
                share += tl.sum(of_temperature, 0)
        index = (b * splits + split) * heads + g
        _store_state(parts, index, grad_products, grad_totals, BLOCK_D)
        if HAS_TEMPERATURE:
            tl.store(shares + index * D + d, share, mask=d < D)


@triton.jit(do_not_specialize=_SIZES)
def _key_grad_kernel(
    k, v, k_b, k_h, k_w, k_g, v_b, v_h, v_w, v_g, state, grad_state, grad_k, grad_v, shares,
    temperature, factor, width, tokens, heads, splits, steps, groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MAP: tl.constexpr, POWER: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of some heads of a block of keys and values, and this block's share in that of temperature."""
    first_head, last_head, block, _, b = _program(heads, splits, groups)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    keep = (n < tokens)[:, None] & (d < D)[None, :]
    k += b * k_b
    v += b * v_b
    grad_k += b * (tokens * heads * D)
    grad_v += b * (tokens * heads * D)
    inverse, squares, powers, projection = d, d, d, d
    if MAP == "focused":
        inverse, squares, powers = _lengths(
            k, n, k_h, k_w, k_g, temperature, factor, width, tokens, heads,
            D, BLOCK_D, BLOCK_N, POWER, HAS_TEMPERATURE,
        )  # fmt: skip
        projection = tl.zeros([BLOCK_N], tl.float32)
        for g in range(0, heads):
            inverse_temperature = _inverse_temperature(temperature, g, D, BLOCK_D, HAS_TEMPERATURE)
            keys = _load_rows(k, n, g, k_h, k_w, k_g, width, tokens, D, BLOCK_D)
            values = _load_rows(v, n, g, v_h, v_w, v_g, width, tokens, D, BLOCK_D)
            features = _features(keys, keep, inverse_temperature, inverse, squares, powers, factor, MAP, POWER)
            grad_products, grad_means = _load_state(grad_state, b * heads + g, BLOCK_D)
            rows = tl.dot(features, grad_products, input_precision=PRECISION)
            projection += tl.sum(rows * values, 1) + tl.sum(features * grad_means[None, :], 1)
    for g in range(first_head, last_head):
        inverse_temperature = _inverse_temperature(temperature, g, D, BLOCK_D, HAS_TEMPERATURE)
        keys = _load_rows(k, n, g, k_h, k_w, k_g, width, tokens, D, BLOCK_D)
        values = _load_rows(v, n, g, v_h, v_w, v_g, width, tokens, D, BLOCK_D)
        if MAP == "softmax":  # of each channel over all tokens
            at = state + ((b * heads + g) * (BLOCK_D + _EXTRA) + BLOCK_D + 1) * BLOCK_D + d
            exponentials = tl.exp2((keys - tl.load(at)[None, :]) * _LOG2_E)
            features = tl.where(keep, exponentials * tl.load(at + BLOCK_D)[None, :], 0.0)
        else:
            features = _features(keys, keep, inverse_temperature, inverse, squares, powers, factor, MAP, POWER)
        grad_products, grad_means = _load_state(grad_state, b * heads + g, BLOCK_D)
        rows = tl.dot(features, grad_products, input_precision=PRECISION)
        _store_dense(grad_v, n, g, heads, tokens, rows, D, BLOCK_D)
        grad_features = tl.dot(values, tl.trans(grad_products), input_precision=PRECISION) + grad_means[None, :]
        if MAP == "softmax":
            rows = features * grad_features
        else:
            rows, of_temperature = _grad_input(
                keys, features, grad_features, keep, inverse_temperature, inverse, squares, powers, projection, factor,
                MAP, POWER,
            )  # fmt: skip
            if HAS_TEMPERATURE:
                index = (b * splits + block) * heads + g
                tl.store(shares + index * D + d, tl.sum(of_temperature, 0), mask=d < D)
        _store_dense(grad_k, n, g, heads, tokens, rows, D, BLOCK_D)
