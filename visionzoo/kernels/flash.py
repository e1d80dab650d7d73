"""Triton functions that several attention kernels share: rows of tokens, and softmax over keys that come in blocks.

Tokens are rows of D numbers at a constant step, as `visionzoo.kernels.launch.token_rows` gives them; scores are in base
2, since exp2 is what the hardware has. Imports Triton: for `<op>/triton.py` alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def program_place(program, count, blocks, G):
    """Head, region, block of its tokens and sample of a program, for `count` regions of `blocks` blocks each.

    Heads go side by side, as their tokens lie; samples are counted in 64 bits.
    """
    block = program // G % blocks
    region = program // (G * blocks) % count
    return program % G, region, block, (program // (G * blocks * count)).to(tl.int64)


@triton.jit
def load_rows(pointer, at, step, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the rows [tokens, D] of tokens `at`, zeros where they are not `inside`."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(pointer + (at * step)[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, at, step, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store what `load_rows` loads."""
    d = tl.arange(0, BLOCK_D)
    tl.store(
        pointer + (at * step)[:, None] + d[None, :],
        rows.to(pointer.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )


@triton.jit
def round_to_tf32(x):
    """Round float32 numbers to the nearest tf32, which a matrix product of that precision would cut off to."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def softmax_start(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return highest score, sum and weighted sum of values of queries that have seen no key."""
    # finite, so that the difference of two scores of a query that sees no key is a number
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    return highest, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def softmax_step(scores, highest, total, accumulated):
    """Take a block of scores [queries, keys] in; return these keys' weights, and the three of `softmax_start` rescaled.

    The caller adds weights @ values to `accumulated`. Scores of -inf are keys that a query does not see.
    """
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_highest[:, None])
    rescale = tl.exp2(highest - new_highest)
    return weights, new_highest, total * rescale + tl.sum(weights, 1), accumulated * rescale[:, None]


@triton.jit
def softmax_end(highest, total, accumulated):
    """Return outputs [queries, D], and the logarithms of the softmax sums for the backward pass.

    A query that saw no key gets 0, and infinity as its logarithm, which makes the gradients through it 0.
    """
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    return accumulated / total[:, None], tl.where(seen, highest + tl.log2(total), float("inf"))
