"""Triton kernels of region routing: one reads queries and keys, once, and sums regions; one scores and chooses.

Of small maps a single kernel does it all, and sums the keys once for every 16 regions that choose.

Sums, means and scores are float32 whatever the input, products exact. A score and its region make one integer each,
the score in front, so that the best is one maximum and ties go to the lower region. Where few regions hold many tokens
each is summed in several parts, which the second kernel adds up in order: results are the same from run to run.
Batch, map and the number of choices are plain arguments, so that a new image size compiles nothing new.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels import flops
from visionzoo.kernels.launch import block_size, blocks, head_block, run, token_rows
from visionzoo.kernels.operator import operator

_SIZES = ["height", "width", "rows", "columns", "valid_height", "valid_width", "splits", "topk"]
_SMALL = 2**18  # numbers of all maps; an estimate, not measured: 0 leaves every map to two kernels
_TILE = 2**14  # numbers that a program of the single kernel reads at once
_LAST = tl.constexpr(1 - 2**63)  # behind every score


def forward(
    q: Tensor, k: Tensor, *, regions: tuple[int, int], topk: int, scale: float, valid_size: tuple[int, int] | None
) -> Tensor:
    """Regions [B, R, topk] for [B, H, W, G, D] as `route_regions` says."""
    return _route(q, k, list(regions), topk, scale, list(valid_size or ()))


def _route_fake(q, k, regions, topk, scale, valid_size):
    return q.new_empty((q.shape[0], regions[0] * regions[1], topk), dtype=torch.int64)


@operator("route_regions", fake=_route_fake, flops=flops.route_regions)
def _route(q: Tensor, k: Tensor, regions: list[int], topk: int, scale: float, valid_size: list[int]) -> Tensor:
    """For each region the `topk` regions of the best scores, best first."""
    (q, q_step), (k, k_step) = token_rows(q), token_rows(k)
    batch, height, width, heads, head_dim = q.shape
    (rows, columns), channels = regions, heads * head_dim
    count, n = rows * columns, height // rows * (width // columns)
    valid_height, valid_width = valid_size or (None, None)
    index = torch.empty((batch, count, topk), dtype=torch.int64, device=q.device)
    block_r, at_once = head_block(count), 1 << (n - 1).bit_length()
    if q.numel() <= _SMALL and (single := _TILE // (block_r * at_once)) >= 16:
        run(
            _route_kernel, batch * blocks(count, 16),
            q, k, q_step, k_step, height, width, rows, columns, valid_height, valid_width, scale, topk, index,
            C=channels, BLOCK_R=block_r, BLOCK_N=at_once, BLOCK_C=min(64, single), num_warps=8, num_stages=1,
        )  # fmt: skip
        return index
    block_n, block_c = block_size(n, q.dtype), min(128, head_block(channels))
    programs = batch * count * blocks(channels, block_c)
    splits = max(1, min(16, 1024 // max(1, programs), n // 256))  # enough programs for any GPU, of 256 tokens at least
    sums = torch.empty((splits, 2, batch, count, channels), dtype=torch.float32, device=q.device)
    run(
        _sum_kernel, programs * splits,
        q, k, q_step, k_step, height, width, rows, columns, valid_height, valid_width, sums, splits,
        C=channels, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=max(1, block_n * block_c // 1024),
    )  # fmt: skip
    run(
        _choose_kernel, batch * blocks(count, 16),
        sums, batch, height, width, rows, columns, valid_height, valid_width, scale, splits, topk, index,
        C=channels, BLOCK_R=block_r, BLOCK_C=32 if block_r <= 256 else 16, num_warps=4 if block_r <= 256 else 8,
    )  # fmt: skip
    return index


@triton.jit(do_not_specialize=_SIZES[:6] + ["topk"])
def _route_kernel(
    q, k, q_step, k_step, height, width, rows, columns, valid_height, valid_width, scale, topk, index,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum 16 of a sample's regions of queries and all of keys, score them, and take the best one after the other."""
    tall, wide, count = height // rows, width // columns, rows * columns
    program = tl.program_id(0)
    own = program % tl.cdiv(count, 16) * 16 + tl.arange(0, 16)
    other = tl.arange(0, BLOCK_R)
    b = (program // tl.cdiv(count, 16)).to(tl.int64)
    q += b * (height * width) * q_step
    k += b * (height * width) * k_step
    own_factor = scale / tl.maximum(_counts(own, tall, wide, columns, valid_height, valid_width), 1).to(tl.float32)
    other_count = _counts(other, tall, wide, columns, valid_height, valid_width)
    other_factor = 1.0 / tl.maximum(other_count, 1).to(tl.float32)
    scores = tl.zeros([16, BLOCK_R], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        queries = _sums(q, q_step, own, c, width, tall, wide, count, columns, valid_height, valid_width, C, BLOCK_N)
        keys = _sums(k, k_step, other, c, width, tall, wide, count, columns, valid_height, valid_width, C, BLOCK_N)
        scores += tl.dot(queries * own_factor[:, None], tl.trans(keys * other_factor[:, None]), input_precision="ieee")
    _choose(scores, own, other, other_count, b, count, topk, index, BLOCK_R)


@triton.jit
def _sums(x, step, region, c, width, tall, wide, count, columns, valid_height, valid_width, C, BLOCK_N: tl.constexpr):
    """Sum regions' tokens, of some channels: [R, BLOCK_C], the loads of BLOCK_N tokens one beside the other."""
    sums = tl.zeros([region.shape[0], c.shape[0]], tl.float32)
    for token in tl.static_range(BLOCK_N):
        y, x_ = region // columns * tall + token // wide, region % columns * wide + token % wide
        inside = (token < tall * wide) & (region < count)
        if valid_height is not None:
            inside = inside & (y < valid_height) & (x_ < valid_width)
        at = (y * width + x_) * step
        mask = inside[:, None] & (c < C)[None, :]
        sums += tl.load(x + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return sums


@triton.jit(do_not_specialize=_SIZES)
def _sum_kernel(
    q, k, q_step, k_step, height, width, rows, columns, valid_height, valid_width, sums, splits,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum queries and keys over one part of a region's tokens, for a block of channels."""
    tall, wide, count = height // rows, width // columns, rows * columns
    n = tall * wide
    program = tl.program_id(0)
    part = tl.cdiv(n, splits)
    split = program % splits
    c = program // splits % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    entry = program // (splits * tl.cdiv(C, BLOCK_C))  # region of a sample
    region, b = entry % count, (entry // count).to(tl.int64)
    q += b * (height * width) * q_step
    k += b * (height * width) * k_step
    sum_q = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    sum_k = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(split * part, tl.minimum((split + 1) * part, n), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        y, x = region // columns * tall + token // wide, region % columns * wide + token % wide
        inside = token < tl.minimum((split + 1) * part, n)
        if valid_height is not None:
            inside = inside & (y < valid_height) & (x < valid_width)
        mask = inside[:, None] & (c < C)[None, :]
        at = y * width + x
        sum_q += tl.load(q + (at * q_step)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        sum_k += tl.load(k + (at * k_step)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    entries = (tl.num_programs(0) // (splits * tl.cdiv(C, BLOCK_C))).to(tl.int64)  # regions of all samples
    sums += (2 * entries * split + entry) * C
    tl.store(sums + c, tl.sum(sum_q, 0), mask=c < C)
    tl.store(sums + entries * C + c, tl.sum(sum_k, 0), mask=c < C)


@triton.jit
def _counts(region, tall, wide, columns, valid_height, valid_width):
    """How many tokens of regions count."""
    if valid_height is not None:
        y, x = region // columns * tall, region % columns * wide
        tokens = tl.minimum(tl.maximum(valid_height - y, 0), tall) * tl.minimum(tl.maximum(valid_width - x, 0), wide)
    else:
        tokens = region * 0 + tall * wide
    return tokens


@triton.jit(do_not_specialize=["batch", *_SIZES])
def _choose_kernel(
    sums, batch, height, width, rows, columns, valid_height, valid_width, scale, splits, topk, index,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Score 16 of a sample's regions with all of them, and take the best one after the other."""
    tall, wide, count = height // rows, width // columns, rows * columns
    program = tl.program_id(0)
    own = program % tl.cdiv(count, 16) * 16 + tl.arange(0, 16)
    other = tl.arange(0, BLOCK_R)
    b = (program // tl.cdiv(count, 16)).to(tl.int64)
    own_count = _counts(own, tall, wide, columns, valid_height, valid_width)
    other_count = _counts(other, tall, wide, columns, valid_height, valid_width)
    own_factor = scale / tl.maximum(own_count, 1).to(tl.float32)
    other_factor = 1.0 / tl.maximum(other_count, 1).to(tl.float32)
    scores = tl.zeros([16, BLOCK_R], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        queries = tl.zeros([16, BLOCK_C], tl.float32)
        keys = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for split in range(splits):
            first = (2 * split * batch + b) * count * C
            queries += tl.load(
                sums + first + own[:, None] * C + c[None, :],
                mask=(own < count)[:, None] & (c < C)[None, :],
                other=0.0,
            )
            keys += tl.load(
                sums + first + batch.to(tl.int64) * count * C + other[:, None] * C + c[None, :],
                mask=(other < count)[:, None] & (c < C)[None, :],
                other=0.0,
            )
        scores += tl.dot(queries * own_factor[:, None], tl.trans(keys * other_factor[:, None]), input_precision="ieee")
    _choose(scores, own, other, other_count, b, count, topk, index, BLOCK_R)


@triton.jit
def _choose(scores, own, other, other_count, b, count, topk, index, BLOCK_R: tl.constexpr):
    """Take the best regions by their scores, one after the other."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0 ties with 0
    scores = tl.where(scores == scores, scores, float("inf"))
    scores = tl.where((other_count > 0)[None, :], scores, float("-inf"))  # padding alone comes last
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered like the scores
    ranked = (bits.to(tl.int64) << 32) | (BLOCK_R - 1 - other)[None, :].to(tl.int64)
    ranked = tl.where((other < count)[None, :], ranked, _LAST)
    for place in range(topk):
        best = tl.max(ranked, 1)
        region = BLOCK_R - 1 - (best & (BLOCK_R - 1))
        tl.store(index + (b * count + own) * topk + place, region, mask=own < count)
        ranked = tl.where(ranked == best[:, None], _LAST, ranked)
