"""Triton kernels of linear attention, forward and backward; tensors are read where they lie, features are not stored.

Three launches forward: programs that own a part of the keys sum φ(k) vᵀ and φ(k) over it; the parts are summed;
programs that own a block of queries apply the sums. Three more backward: over queries (their gradient, and parts of the
gradient of the sums), over these parts, over keys. A program takes several heads of its tokens, one after the other,
because lengths of "focused" features span all heads. Nothing is summed by atomics: results repeat bit for bit.

A "state" is what queries need to know of one head's keys, in a row of float32 numbers, D and V padded to the widths of
blocks: "products" [D, V], the mean of φ(k) vᵀ; "totals" [D], the mean of φ(k); for "softmax" the largest key of each
channel and the number that makes features of exponentials, [D] each. Its gradient has the same layout.

Features and states are float32, and enter matrix products as tf32: rounded for values of bfloat16, whose own rounding
is eight times as coarse; in two numbers for float16, and where differences of near numbers are to come out. Features
that the caller computed ("identity") and that are wider than a block are cut into parts, whose sums are added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels import flops
from visionzoo.kernels.dispatch import MAX_HEAD_DIM
from visionzoo.kernels.launch import blocks, dot_precision, head_block, run, token_rows
from visionzoo.kernels.online_softmax import LOG2_E, load_rows, round_to_tf32, store_rows
from visionzoo.kernels.operator import operator

# arguments that vary with batch and image: the compiler must not look at their values
_SIZES = ["tokens", "keys", "steps", "splits", "groups"]
_LEAST = 1e-18  # whose square float32 holds
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
    weights: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of [B, H, W, G, D] tensors as `linear_attention` says, and mean weights, empty unless asked for."""
    sharpness = None if temperature is None else temperature.float().reciprocal()
    options = (sharpness, feature_map, float(focusing_factor), float(eps))
    if q.shape[-1] <= MAX_HEAD_DIM:
        return _attend(q, k, v, *options, weights)[:2]
    count = blocks(q.shape[-1], MAX_HEAD_DIM)
    added = eps or _LEAST  # a part's weights may all be 0 where their sum over the parts is not
    sums, totals = [], []
    for part_q, part_k in zip(q.chunk(count, -1), k.chunk(count, -1), strict=True):
        out, total, _ = _attend(part_q, part_k, v.float(), *options[:-1], added, True)  # rounded once, at the end
        sums.append(out * (total + added)[..., None])
        totals.append(total)
    total = torch.stack(totals).sum(0)
    return (torch.stack(sums).sum(0) / (total + eps)[..., None]).to(v.dtype), total


# -- operators --------------------------------------------------------------------------------------------------------


def _attend_fake(q, k, v, sharpness, feature_map, factor, eps, ask_weights):
    state = q.new_empty(
        (q.shape[0], q.shape[3], _state_size(q.shape[-1], v.shape[-1], feature_map)), dtype=torch.float32
    )
    weights = q.new_empty(q.shape[:4] if ask_weights else 0, dtype=torch.float32)
    return v.new_empty((*q.shape[:4], v.shape[-1])), weights, state


def _state_size(head_dim: int, value_dim: int, feature_map: str) -> int:
    return head_block(head_dim) * (head_block(value_dim) + (3 if feature_map == "softmax" else 1))


def _save(ctx, inputs, output):
    q, k, v, sharpness, ctx.feature_map, ctx.factor, ctx.eps, ctx.asked = inputs
    ctx.save_for_backward(output[2], q, k, v, sharpness)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_weights, _grad_state):
    state, q, k, v, sharpness = ctx.saved_tensors
    grad_weights = grad_weights if ctx.asked else None  # of no numbers, then
    if grad is None and grad_weights is None:
        return (None,) * 8
    if grad is None:  # only of the weights
        grad = v.new_zeros((*q.shape[:4], v.shape[-1]))
    *grads, grad_sharpness = _attend_backward(
        grad, grad_weights, state, q, k, v, sharpness, ctx.feature_map, ctx.factor, ctx.eps
    )
    return *grads, grad_sharpness if ctx.needs_input_grad[3] else None, None, None, None, None


@operator("linear_attention", fake=_attend_fake, save=_save, differentiate=_differentiate, flops=flops.linear_attention)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharpness: Tensor | None,
    feature_map: str,
    factor: float,
    eps: float,
    ask_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, W, G, V]; mean weights [B, H, W, G], empty where not asked for; the keys' states [B, G, ...]."""
    call = _Call(q, k, v, sharpness, feature_map, factor, eps)
    out = torch.empty((*q.shape[:4], v.shape[-1]), dtype=v.dtype, device=q.device)
    weights = torch.empty(q.shape[:4] if ask_weights else 0, dtype=torch.float32, device=q.device)
    keys = call.parts(call.key_count)
    parts = call.states(keys.splits)
    call.launch(_state_kernel, keys, call.k, call.v, call.k_step, call.v_step, call.notes(keys, 2), parts)
    state = call.sum_parts(parts)
    noted = weights if ask_weights else None
    call.launch(_output_kernel, call.single_blocks(call.query_count), call.q, call.q_step, state, out, noted)
    return out, weights, state


def _attend_backward_fake(grad, grad_weights, state, q, k, v, sharpness, feature_map, factor, eps):
    grad_sharpness = q.new_empty(0) if sharpness is None else sharpness.new_empty(sharpness.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sharpness


@operator("linear_attention_backward", fake=_attend_backward_fake, flops=flops.backward(flops.linear_attention, 3))
def _attend_backward(
    grad: Tensor,
    grad_weights: Tensor | None,
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharpness: Tensor | None,
    feature_map: str,
    factor: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sharpness; the last is empty where there is none."""
    call = _Call(q, k, v, sharpness, feature_map, factor, eps)
    grad = grad.contiguous()
    grad_weights = None if grad_weights is None else grad_weights.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    queries, keys = call.parts(call.query_count), call.single_blocks(call.key_count)
    parts = call.states(queries.splits)
    query_shares, key_shares = call.sharpness_shares(queries), call.sharpness_shares(keys)
    notes = call.notes(queries, 4)
    call.launch(
        _query_grad_kernel, queries,
        call.q, call.q_step, grad, grad_weights, state, notes, grad_q, parts, query_shares,
    )  # fmt: skip
    grad_state = call.sum_parts(parts, state)
    call.launch(
        _key_grad_kernel, keys, call.k, call.v, call.k_step, call.v_step, state, grad_state, grad_k, grad_v, key_shares
    )
    if sharpness is None or query_shares is None or key_shares is None:
        return grad_q, grad_k, grad_v, q.new_empty(0)
    return grad_q, grad_k, grad_v, (query_shares.sum((0, 1)) + key_shares.sum((0, 1))) / sharpness


class _Plan(NamedTuple):
    """How programs share B samples of tokens: `splits` parts of `steps` blocks each, and `groups` groups of heads."""

    tokens: int
    steps: int
    splits: int
    groups: int


class _Call:
    """One call's tensors, and what all its kernels share."""

    def __init__(self, q, k, v, sharpness, feature_map, factor, eps):
        (self.q, self.q_step), (self.k, self.k_step), (self.v, self.v_step) = map(token_rows, (q, k, v))
        self.batch, height, width, self.heads, head_dim = q.shape
        self.query_count, self.key_count = height * width, k.shape[1] * k.shape[2]
        self.sharpness = None if sharpness is None else sharpness.contiguous()
        self.numbers = (factor, eps)
        self.spans_heads = feature_map == "focused"
        self.state_size = _state_size(head_dim, v.shape[-1], feature_map)
        self.block_d, block_v = head_block(head_dim), head_block(v.shape[-1])
        precision = close = dot_precision(v.dtype)
        if v.dtype != torch.float32:
            precision, close = "tf32" if v.dtype == torch.bfloat16 else "tf32x3", "tf32x3"
        # sizes by what registers hold: matrix units want larger tiles than exact products, which ordinary ones compute
        block = max(self.block_d, block_v)
        if precision == "ieee":
            self.rows, self.columns, self.warps = 2048 // block, 16, min(8, block // 4)
        else:
            self.rows, self.columns, self.warps = 4096 // block, 2048 // block, block // 16
        # where features span the heads, every program has to pass over all of them
        self.programs = _PROGRAMS // 2 if self.spans_heads else _PROGRAMS
        self.options = {
            "MAP": feature_map,
            "POWER": int(factor) if factor in range(1, 9) else -1,
            "G": self.heads,
            "D": head_dim,
            "V": v.shape[-1],
            "BLOCK_D": self.block_d,
            "BLOCK_V": block_v,
            "BLOCK_E": min(block_v, self.columns, 32),
            "STATE": self.state_size,
            "PRECISION": precision,
            "CLOSE": close,
        }

    def launch(self, kernel, plan: _Plan, *tensors) -> None:
        """Run a kernel as planned."""
        run(
            kernel, self.batch * plan.splits * plan.groups,
            *tensors, self.sharpness, *self.numbers, *plan, **self.options, BLOCK_N=self.block(plan.tokens),
            num_warps=self.warps, num_stages=1,
        )  # fmt: skip

    def block(self, tokens: int) -> int:
        """Tokens of a block: few sizes, so that few kernels are ever compiled, whatever the image size."""
        return max(16, min(self.rows, 64, 1 << (tokens - 1).bit_length()))

    def parts(self, tokens: int) -> _Plan:
        """Few parts, for each has its own sums, but enough programs for a GPU."""
        count = blocks(tokens, self.block(tokens))
        groups = 1 if self.spans_heads else self.heads
        return self._plan(tokens, max(1, min(count, self.batch * count * groups // self.programs)))

    def single_blocks(self, tokens: int) -> _Plan:
        """One block for a program."""
        return self._plan(tokens, 1)

    def _plan(self, tokens: int, steps: int) -> _Plan:
        splits = blocks(tokens, self.block(tokens) * steps)
        share = max(1, self.heads * self.batch * splits // self.programs) if self.spans_heads else 1
        return _Plan(tokens, steps, splits, blocks(self.heads, min(self.heads, share)))

    def notes(self, plan: _Plan, count: int) -> Tensor | None:
        """Room for `count` numbers that a program notes of each of its tokens between its passes over the heads."""
        if not self.spans_heads:
            return None
        size = self.batch * plan.groups * count * plan.tokens
        return torch.empty(size, dtype=torch.float32, device=self.q.device)

    def states(self, splits: int) -> Tensor:
        """Room for the parts of states."""
        shape = (self.batch, splits, self.heads, self.state_size)
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def sum_parts(self, parts: Tensor, state: Tensor | None = None) -> Tensor:
        """Sum states [B, splits, G, ...] over their parts; or gradients, where the `state` is given."""
        summed = torch.empty((self.batch, self.heads, self.state_size), dtype=torch.float32, device=parts.device)
        options = {name: self.options[name] for name in ("MAP", "G", "BLOCK_D", "BLOCK_V", "STATE")}
        run(
            _sum_kernel, self.batch * self.heads * self.block_d // 4,
            parts, state, summed, parts.shape[1], self.key_count, **options, ROWS=4, BLOCK_S=32,
            num_warps=min(8, self.block_d // 8), num_stages=1,
        )  # fmt: skip
        return summed

    def sharpness_shares(self, plan: _Plan) -> Tensor | None:
        """Room for the shares of programs in the sharpness's gradient."""
        if self.sharpness is None:
            return None
        shape = (self.batch, plan.splits, *self.sharpness.shape)
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _program(tokens, steps, splits, groups, G: tl.constexpr, BLOCK_N: tl.constexpr):
    """First and last head, part, its first and last token, number of the group of heads and sample of this program."""
    program = tl.program_id(0)
    group, split = program % groups, program // groups % splits
    b = (program // (groups * splits)).to(tl.int64)
    share = tl.cdiv(G, groups)
    begin = split * (steps * BLOCK_N)
    end = tl.minimum(tokens, begin + steps * BLOCK_N)
    return group * share, tl.minimum(G, (group + 1) * share), split, begin, end, b * groups + group, b


@triton.jit
def _load_products(state, e, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr):
    """Columns e, e + 1, ... of a state's products, or of their gradient."""
    return tl.load(state + tl.arange(0, BLOCK_D)[:, None] * BLOCK_V + e + tl.arange(0, BLOCK_E)[None, :])


@triton.jit
def _load_totals(state, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    """Totals of a state, or their gradient."""
    return tl.load(state + BLOCK_D * BLOCK_V + tl.arange(0, BLOCK_D))


@triton.jit
def _store_state(state, products, totals, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):
    """Write what `_load_products` and `_load_totals` read."""
    d = tl.arange(0, BLOCK_D)
    tl.store(state + d[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :], products)
    tl.store(state + BLOCK_D * BLOCK_V + d, totals)


@triton.jit
def _inverse(x):
    """1 / x of positive numbers, in a quarter of a division's instructions."""
    y = tl.rsqrt(x)
    y *= y
    return y + y * (1.0 - x * y)


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """Round numbers as a matrix product will see them."""
    if PRECISION == "tf32":
        return round_to_tf32(x)
    else:
        return x


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """Matrix product of float32 numbers; `EXACT` names the side that tf32 represents, which saves a third of tf32x3."""
    if PRECISION == "tf32x3" and EXACT == "a":
        high = round_to_tf32(b)
        return tl.dot(a, high, input_precision="tf32") + tl.dot(a, b - high, input_precision="tf32")
    elif PRECISION == "tf32x3" and EXACT == "b":
        high = round_to_tf32(a)
        return tl.dot(high, b, input_precision="tf32") + tl.dot(a - high, b, input_precision="tf32")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _store_applied(
    rows, features, scale, state, n, step, inside,
    V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write scaled products [tokens, V] of features with a state's products, some columns at a time."""
    for e in tl.static_range(0, BLOCK_V, BLOCK_E):
        products = _rounded(_load_products(state, e, BLOCK_D, BLOCK_V, BLOCK_E), PRECISION)
        applied = _dot(features, products, PRECISION, EXACT="") * scale[:, None]
        store_rows(rows + e, n, step, applied, inside, V - e, BLOCK_E)


@triton.jit
def _projected(
    rows, centre, state, n, step, inside, BLOCK_N: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, CLOSE: tl.constexpr,
):  # fmt: skip
    """Products [tokens, D] of rows, less a `centre` [V] if there is one, with a state's transposed products.

    Computed some columns at a time. Where values have a large mean, what comes of this are small differences of large
    numbers: tf32 is not enough.
    """
    projected = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for e in tl.static_range(0, BLOCK_V, BLOCK_E):
        some = load_rows(rows + e, n, step, inside, V - e, BLOCK_E).to(tl.float32)
        products = tl.trans(_load_products(state, e, BLOCK_D, BLOCK_V, BLOCK_E))
        if centre is None:
            projected += _dot(some, products, CLOSE, EXACT="a")
        else:
            projected += _dot(some - tl.load(centre + e + tl.arange(0, BLOCK_E))[None, :], products, CLOSE, EXACT="")
    return projected


@triton.jit
def _sharpness(sharpness, g, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / temperature of a head, [D]; zeros in the block's padding, whose features are zeros then."""
    d = tl.arange(0, BLOCK_D)
    if sharpness is None:
        return (d < D).to(tl.float32)
    else:
        # Numbers that do not all come from memory keep the compiler from computing features a second time, in the
        # layout that a matrix product takes.
        return tl.where(d < D, tl.load(sharpness + g * D + d, mask=d < D, other=0.0), 0.0)


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
def _positive(x, sharp):
    """Compute the t of "focused" features."""
    return tl.maximum(x, 0.0) * sharp[None, :] + (1e-6 * sharp)[None, :]


@triton.jit
def _lengths(
    x, n, step, sharpness, factor, tokens,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Compute what "focused" features of tokens depend on over all heads.

    Powers are taken of w = t / max t, since those of the numbers themselves overflow. Returns 1 / max t; what w^p is
    multiplied by, which is zero for what is no token; and the sums of squares of w and of w^p.
    """
    largest = tl.full([BLOCK_N], 1e-30, tl.float32)
    inverse = tl.full([BLOCK_N], 1e30, tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    powers = tl.zeros([BLOCK_N], tl.float32)
    for g in range(0, G):
        rows = load_rows(x + g * D, n, step, n < tokens, D, BLOCK_D).to(tl.float32)
        t = _positive(rows, _sharpness(sharpness, g, D, BLOCK_D))
        new_largest = tl.maximum(largest, tl.max(t, 1))
        inverse = _inverse(new_largest)
        w = t * inverse[:, None]
        w *= w
        shrink = largest * inverse
        shrink *= shrink
        squares = squares * shrink + tl.sum(w, 1)
        powers = powers * _power(shrink, factor, POWER) + tl.sum(_power(w, factor, POWER), 1)
        largest = new_largest
    multiplier = tl.where(n < tokens, largest * tl.sqrt(squares / powers), 0.0)
    return inverse, multiplier, squares, powers


@triton.jit
def _note(notes, n, tokens, a, b):
    """Keep two numbers of each token for this program's next pass over the heads."""
    tl.store(notes + n, a, mask=n < tokens)
    tl.store(notes + tokens + n, b, mask=n < tokens)


@triton.jit
def _noted(notes, n, tokens):
    """Read what `_note` kept."""
    return tl.load(notes + n, mask=n < tokens, other=0.0), tl.load(notes + tokens + n, mask=n < tokens, other=0.0)


@triton.jit
def _features(
    x, inside, sharp, inverse, multiplier, factor,
    MAP: tl.constexpr, POWER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """φ of rows [tokens, D], zeros in the block's padding; "softmax" as for queries."""
    channels = (tl.arange(0, BLOCK_D) < D)[None, :]
    if MAP == "identity":
        return x
    elif MAP == "relu":
        return tl.maximum(x, 0.0)
    elif MAP == "elu":
        return tl.where(inside[:, None] & channels, tl.where(x > 0.0, x + 1.0, tl.exp2(x * LOG2_E)), 0.0)
    elif MAP == "softmax":
        x = tl.where(channels, x, float("-inf"))
        x = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2_E)
        return x * (1.0 / tl.sum(x, 1))[:, None]
    else:
        return _power(_positive(x, sharp) * inverse[:, None], factor, POWER) * multiplier[:, None]


@triton.jit
def _radial(projection, inverse, squares, powers, factor):
    """Compute what `_grad_input` takes of the lengths: multipliers of w and of -w^(2p-1) in the gradient of t.

    `projection` is the sum over all heads of the products of features and their gradients.
    """
    along = projection * inverse
    return along / squares, along * factor / powers


@triton.jit
def _grad_input(
    x, features, grad, sharp, inverse, multiplier, outwards, inwards, factor,
    MAP: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Gradient of x from that of its features, and for "focused" features the products of t and its gradient."""
    if MAP == "identity":
        return grad, grad
    elif MAP == "relu":
        return tl.where(x > 0.0, grad, 0.0), grad
    elif MAP == "elu":
        return tl.where(x > 0.0, grad, grad * features), grad
    elif MAP == "softmax":
        return features * (grad - tl.sum(features * grad, 1)[:, None]), grad
    else:
        t = _positive(x, sharp)
        w = t * inverse[:, None]
        slope = _power(w, factor - 1.0, POWER - 1 if POWER > 0 else POWER)
        grad_t = slope * (grad * (factor * multiplier * inverse)[:, None] - slope * w * inwards[:, None])
        grad_t += w * outwards[:, None]
        return tl.where(x > 0.0, grad_t * sharp[None, :], 0.0), grad_t * t


@triton.jit(do_not_specialize=_SIZES)
def _state_kernel(
    k, v, k_step, v_step, notes, parts, sharpness, factor, eps, tokens, steps, splits, groups,
    MAP: tl.constexpr, POWER: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr, CLOSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum the states of some heads over one part of the keys."""
    first, last, split, begin, end, number, b = _program(tokens, steps, splits, groups, G, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k += b * tokens * k_step
    v += b * tokens * v_step
    if MAP == "focused":
        notes += number * (2 * tokens)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inverse, multiplier, _, _ = _lengths(k, n, k_step, sharpness, factor, tokens, G, D, BLOCK_D, BLOCK_N, POWER)
            _note(notes, n, tokens, inverse, multiplier)
        tl.debug_barrier()  # other threads of this program read the notes
    for g in range(first, last):
        sharp = _sharpness(sharpness, g, D, BLOCK_D)
        highest = tl.full([BLOCK_D], -1e30, tl.float32)
        products = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
        totals = tl.zeros([BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside = n < tokens
            keys = load_rows(k + g * D, n, k_step, inside, D, BLOCK_D).to(tl.float32)
            values = load_rows(v + g * V, n, v_step, inside, V, BLOCK_V).to(tl.float32)
            if MAP == "softmax":  # of each channel over all tokens
                keys = tl.where(inside[:, None] & (d < D)[None, :], keys, float("-inf"))
                new_highest = tl.maximum(highest, tl.max(keys, 0))
                rescale = tl.exp2((highest - new_highest) * LOG2_E)
                features = tl.exp2((keys - new_highest[None, :]) * LOG2_E)
                products *= rescale[:, None]
                totals *= rescale
                highest = new_highest
            else:
                inverse, multiplier = None, None
                if MAP == "focused":
                    inverse, multiplier = _noted(notes, n, tokens)
                features = _features(keys, inside, sharp, inverse, multiplier, factor, MAP, POWER, D, BLOCK_D)
            features = _rounded(features, PRECISION)  # the totals' too: one set of weights for all
            products += _dot(tl.trans(features), values, PRECISION, EXACT="b")
            totals += tl.sum(features, 0)
        index = (b * splits + split) * G + g
        part = parts + index * STATE
        _store_state(part, products, totals, BLOCK_D, BLOCK_V)
        if MAP == "softmax":
            tl.store(part + BLOCK_D * (BLOCK_V + 1) + d, highest)


@triton.jit(do_not_specialize=_SIZES)
def _sum_kernel(
    parts, state, summed, splits, keys,
    MAP: tl.constexpr, G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sum rows of a state, or of its gradient where the `state` is given, over all parts, and divide by the keys."""
    normalize: tl.constexpr = MAP == "softmax" and state is None
    row = tl.program_id(0) % (BLOCK_D // ROWS) * ROWS + tl.arange(0, ROWS)
    index = (tl.program_id(0) // (BLOCK_D // ROWS)).to(tl.int64)
    number = row[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    parts += (index // G * splits * G + index % G) * STATE
    summed += index * STATE
    highest = tl.full([ROWS], -1e30, tl.float32)
    if normalize:
        for start in range(0, splits, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            at = parts + (s.to(tl.int64) * (G * STATE))[:, None] + BLOCK_D * (BLOCK_V + 1) + row[None, :]
            highest = tl.maximum(highest, tl.max(tl.load(at, mask=(s < splits)[:, None], other=-1e30), 0))
    products = tl.zeros([ROWS, BLOCK_V], tl.float32)
    totals = tl.zeros([ROWS], tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        part = parts + s.to(tl.int64) * (G * STATE)
        inside = s < splits
        some = tl.load(part[:, None, None] + number[None, :, :], mask=inside[:, None, None], other=0.0)
        at = part[:, None] + BLOCK_D * BLOCK_V + row[None, :]
        some_totals = tl.load(at, mask=inside[:, None], other=0.0)
        if normalize:
            own = tl.load(at + BLOCK_D, mask=inside[:, None], other=-1e30)
            weight = tl.exp2((own - highest[None, :]) * LOG2_E)
            some *= weight[:, :, None]
            some_totals *= weight
        products += tl.sum(some, 0)
        totals += tl.sum(some_totals, 0)
    if normalize:
        totals = tl.where(totals > 0.0, totals, 1.0)  # there are no keys in the block's padding
        products = products / totals[:, None]
        tl.store(summed + BLOCK_D * (BLOCK_V + 1) + row, highest)
        tl.store(summed + BLOCK_D * (BLOCK_V + 2) + row, keys / totals)
        totals = tl.full([ROWS], 1.0, tl.float32)
    else:
        products = products / keys
        totals = totals / keys
        if MAP == "softmax":  # the mean of features is 1, whatever the keys; instead, what their normalizer answers for
            # of values less the first channel's mean, as in `_key_grad_kernel`: small differences stay exact
            state += index * STATE
            centred = tl.load(state + number) - tl.load(state + tl.arange(0, BLOCK_V))[None, :]
            totals = -tl.sum(products * centred, 1)
    tl.store(summed + number, products)
    tl.store(summed + BLOCK_D * BLOCK_V + row, totals)


@triton.jit(do_not_specialize=_SIZES)
def _output_kernel(
    q, q_step, state, out, weights, sharpness, factor, eps, tokens, steps, splits, groups,
    MAP: tl.constexpr, POWER: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr, CLOSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute some heads of a block of outputs."""
    first, last, _, begin, _, _, b = _program(tokens, steps, splits, groups, G, BLOCK_N)
    n = begin + tl.arange(0, BLOCK_N)
    inside = n < tokens
    q += b * tokens * q_step
    out += b * tokens * (G * V)
    inverse, multiplier = None, None
    if MAP == "focused":
        inverse, multiplier, _, _ = _lengths(q, n, q_step, sharpness, factor, tokens, G, D, BLOCK_D, BLOCK_N, POWER)
    for g in range(first, last):
        sharp = _sharpness(sharpness, g, D, BLOCK_D)
        queries = load_rows(q + g * D, n, q_step, inside, D, BLOCK_D).to(tl.float32)
        features = _features(queries, inside, sharp, inverse, multiplier, factor, MAP, POWER, D, BLOCK_D)
        features = _rounded(features, PRECISION)
        own = state + (b * G + g) * STATE
        total = tl.sum(features * _load_totals(own, BLOCK_D, BLOCK_V)[None, :], 1)
        if weights is not None:
            tl.store(weights + (b * tokens + n) * G + g, total, mask=inside)
        over_total = 1.0 / tl.where(inside, total + eps, 1.0)
        _store_applied(
            out + g * V, features, over_total, own, n, G * V, inside, V, BLOCK_D, BLOCK_V, BLOCK_E, PRECISION
        )


@triton.jit(do_not_specialize=_SIZES)
def _query_grad_kernel(
    q, q_step, grad, grad_weights, state, notes, grad_q, parts, shares,
    sharpness, factor, eps, tokens, steps, splits, groups,
    MAP: tl.constexpr, POWER: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr, CLOSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of some heads of one part of the queries, and this part's share in those of state and sharpness."""
    first, last, split, begin, end, number, b = _program(tokens, steps, splits, groups, G, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q += b * tokens * q_step
    grad += b * tokens * (G * V)
    if grad_weights is not None:
        grad_weights += b * tokens * G
    grad_q += b * tokens * (G * D)
    if MAP == "focused":
        notes += number * (4 * tokens)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside = n < tokens
            inverse, multiplier, squares, powers = _lengths(
                q, n, q_step, sharpness, factor, tokens, G, D, BLOCK_D, BLOCK_N, POWER
            )
            projection = tl.zeros([BLOCK_N], tl.float32)
            for g in range(0, G):
                sharp = _sharpness(sharpness, g, D, BLOCK_D)
                queries = load_rows(q + g * D, n, q_step, inside, D, BLOCK_D).to(tl.float32)
                features = _features(queries, inside, sharp, inverse, multiplier, factor, MAP, POWER, D, BLOCK_D)
                own = state + (b * G + g) * STATE
                total = tl.sum(features * _load_totals(own, BLOCK_D, BLOCK_V)[None, :], 1)
                over_total = 1.0 / tl.where(inside, total + eps, 1.0)
                grad_features = _projected(
                    grad + g * V, None, own, n, G * V, inside, BLOCK_N, V, BLOCK_D, BLOCK_V, BLOCK_E, CLOSE
                )
                # features and their gradient are orthogonal but for eps
                projection += tl.sum(grad_features * features, 1) * (over_total * over_total) * eps
                if grad_weights is not None:
                    projection += total * tl.load(grad_weights + n * G + g, mask=inside, other=0.0)
            outwards, inwards = _radial(projection, inverse, squares, powers, factor)
            _note(notes, n, tokens, inverse, multiplier)
            _note(notes + 2 * tokens, n, tokens, outwards, inwards)
        tl.debug_barrier()  # other threads of this program read the notes
    for g in range(first, last):
        sharp = _sharpness(sharpness, g, D, BLOCK_D)
        own = state + (b * G + g) * STATE
        means = _load_totals(own, BLOCK_D, BLOCK_V)
        grad_products = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
        grad_totals = tl.zeros([BLOCK_D], tl.float32)
        share = tl.zeros([BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside = n < tokens
            inverse, multiplier, outwards, inwards = None, None, None, None
            if MAP == "focused":
                inverse, multiplier = _noted(notes, n, tokens)
                outwards, inwards = _noted(notes + 2 * tokens, n, tokens)
            queries = load_rows(q + g * D, n, q_step, inside, D, BLOCK_D).to(tl.float32)
            features = _features(queries, inside, sharp, inverse, multiplier, factor, MAP, POWER, D, BLOCK_D)
            total = tl.where(inside, tl.sum(features * means[None, :], 1) + eps, 1.0)
            over_total = 1.0 / total
            grad_features = _projected(
                grad + g * V, None, own, n, G * V, inside, BLOCK_N, V, BLOCK_D, BLOCK_V, BLOCK_E, CLOSE
            )
            grad_total = -tl.sum(grad_features * features, 1) * over_total * over_total
            if grad_weights is not None:
                grad_total += tl.load(grad_weights + n * G + g, mask=inside, other=0.0)
            grad_features = grad_features * over_total[:, None] + grad_total[:, None] * means[None, :]
            weights = _rounded(features * over_total[:, None], PRECISION)
            grads = load_rows(grad + g * V, n, G * V, inside, V, BLOCK_V).to(tl.float32)
            grad_products += _dot(tl.trans(weights), grads, PRECISION, EXACT="b")
            grad_totals += tl.sum(weights * (grad_total * total)[:, None], 0)
            rows, of_sharpness = _grad_input(
                queries, features, grad_features, sharp, inverse, multiplier, outwards, inwards, factor, MAP, POWER
            )
            store_rows(grad_q + g * D, n, G * D, rows, inside, D, BLOCK_D)
            if shares is not None:
                share += tl.sum(of_sharpness, 0)
        index = (b * splits + split) * G + g
        _store_state(parts + index * STATE, grad_products, grad_totals, BLOCK_D, BLOCK_V)
        if shares is not None:
            tl.store(shares + index * D + d, share, mask=d < D)


@triton.jit(do_not_specialize=_SIZES)
def _key_grad_kernel(
    k, v, k_step, v_step, state, grad_state, grad_k, grad_v, shares,
    sharpness, factor, eps, tokens, steps, splits, groups,
    MAP: tl.constexpr, POWER: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr, CLOSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of some heads of a block of keys and values, and this block's share in that of sharpness."""
    first, last, block, begin, _, _, b = _program(tokens, steps, splits, groups, G, BLOCK_N)
    n = begin + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = n < tokens
    k += b * tokens * k_step
    v += b * tokens * v_step
    grad_k += b * tokens * (G * D)
    grad_v += b * tokens * (G * V)
    inverse, multiplier, outwards, inwards = None, None, None, None
    if MAP == "focused":
        inverse, multiplier, squares, powers = _lengths(
            k, n, k_step, sharpness, factor, tokens, G, D, BLOCK_D, BLOCK_N, POWER
        )
        projection = tl.zeros([BLOCK_N], tl.float32)
        for g in range(0, G):
            sharp = _sharpness(sharpness, g, D, BLOCK_D)
            keys = load_rows(k + g * D, n, k_step, inside, D, BLOCK_D).to(tl.float32)
            features = _features(keys, inside, sharp, inverse, multiplier, factor, MAP, POWER, D, BLOCK_D)
            own = grad_state + (b * G + g) * STATE
            grad_features = _projected(
                v + g * V, None, own, n, v_step, inside, BLOCK_N, V, BLOCK_D, BLOCK_V, BLOCK_E, CLOSE
            )
            grad_features += _load_totals(own, BLOCK_D, BLOCK_V)[None, :]
            projection += tl.sum(features * grad_features, 1)
        outwards, inwards = _radial(projection, inverse, squares, powers, factor)
    for g in range(first, last):
        sharp = _sharpness(sharpness, g, D, BLOCK_D)
        keys = load_rows(k + g * D, n, k_step, inside, D, BLOCK_D).to(tl.float32)
        if MAP == "softmax":  # of each channel over all tokens
            at = state + (b * G + g) * STATE + BLOCK_D * (BLOCK_V + 1) + d
            exponents = (keys - tl.load(at)[None, :]) * LOG2_E
            exponents = tl.where(inside[:, None] & (d < D)[None, :], exponents, float("-inf"))
            features = tl.exp2(exponents) * tl.load(at + BLOCK_D)[None, :]
        else:
            features = _features(keys, inside, sharp, inverse, multiplier, factor, MAP, POWER, D, BLOCK_D)
        own = grad_state + (b * G + g) * STATE
        _store_applied(
            grad_v + g * V, _rounded(features, PRECISION), inside.to(tl.float32), own, n, G * V, inside,
            V, BLOCK_D, BLOCK_V, BLOCK_E, PRECISION,
        )  # fmt: skip
        centre = None
        if MAP == "softmax":
            centre = state + (b * G + g) * STATE
        grad_features = _projected(
            v + g * V, centre, own, n, v_step, inside, BLOCK_N, V, BLOCK_D, BLOCK_V, BLOCK_E, CLOSE
        )
        grad_features += _load_totals(own, BLOCK_D, BLOCK_V)[None, :]
        if MAP == "softmax":
            rows = features * grad_features
        else:
            rows, of_sharpness = _grad_input(
                keys, features, grad_features, sharp, inverse, multiplier, outwards, inwards, factor, MAP, POWER
            )
            if shares is not None:
                index = (b * splits + block) * G + g
                tl.store(shares + index * D + d, tl.sum(of_sharpness, 0), mask=d < D)
        store_rows(grad_k + g * D, n, G * D, rows, inside, D, BLOCK_D)
