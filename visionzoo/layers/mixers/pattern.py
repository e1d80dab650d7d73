"""Attention along fixed patterns: rows, columns, discs, summaries of them, all under one softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.tracing import replaced


class Seen(NamedTuple):
    """What one part of a pattern shows to the queries of a map [B, G, H, W, D]."""

    scores: Tensor  # [B, G, H, W, M]
    values: Callable[[Tensor], Tensor]  # of weights [B, G, H, W, M] the sum [B, G, H, W, D]
    rows: Tensor | None = None  # where the keys are, broadcast to [H, W, M]; None for summaries
    columns: Tensor | None = None


class PatternMixer(Mixer):
    """Each token attends to the tokens and summaries that a fixed pattern shows it, under one softmax.

        yᵢ = Σ over j ∈ P(i) of softmaxⱼ(qᵢ·kⱼ / √D) vⱼ

    Time: O(N·C·(C + M)) for M keys of a token; memory: O(N·(C + M·G)).

    P(i) is the union of `parts`. Scores are held, in float32 at least. The parts, and their M:

    - "row" and "column": the tokens of the own one; W and H;
    - "band": those less than W places away in row-major order; up to 2W - 1 (3W are held);
    - "last_columns": the last `summary_columns` columns of the map; that times H;
    - "disc": those nearer than `radius`, cut at the map's borders; about π·radius²;
    - "cells": the sums of keys and values in cells of `cell_size`², by learned weights (means at the start), with zeros
      where the map ends; N/cell_size², for all tokens alike;
    - "row_summaries": for each row one key, the largest of its keys channel by channel, whose value is what the largest
      of its queries sees of that row; H;
    - "above", "below", "left" and "right": for each token of the own row (above, below) or column one key, the sum of
      the keys above it (…), whose value is what the sum of the queries there sees there; W or H. Where nothing is
      above, the key is 0 and the value the mean of the column. N·H or N·W further scores make the values.

    On a map whose rows are the segments, and without causal masks, they are

    - the sparse transformer (arXiv:1904.10509): ("band", "column") is its strided attention, ("row", "last_columns")
      its fixed one, ("row", "column") the axial form; there, each part is a head of its own. Rules from
      https://github.com/openai/sparse_attention at c53f3bd (no license), which has causal modes only;
    - CLEAR (arXiv:2412.16112): ("disc",) and ("disc", "cells"), https://github.com/Huage001/CLEAR at 98e9fed
      (Apache-2.0), without text tokens;
    - Combiner (arXiv:2107.05768): ("row", "row_summaries") is Combiner-Fixed; ("row", "column", "above", "below",
      "left", "right") with `count_once=False` is Combiner-Axial. https://github.com/google-research/google-research,
      combiner/ at 5b09c22 (Apache-2.0). As there the own row has a summary too, and sums stand for running maxima.

    65,536 tokens in rows of 256 have 0.4 GiB of scores a head under Combiner-Axial, whose training then peaks at about
    2 GiB a head, and 0.13 GiB in rows and columns.

    Args:
        dim: channels C.
        num_heads: attention heads G.
        parts: names of `PARTS`, without repetition.
        count_once: a token that several parts show counts once; otherwise it has a place in the softmax for each.
        radius: of "disc", in tokens; tokens at that distance are left out.
        cell_size: side of "cells".
        summary_columns: of "last_columns"; all where the map has fewer.
        qkv_bias: whether the projection to q, k, v has a bias.
        kv_heads: heads of keys and values, see `Mixer`.

    Raises:
        ValueError: if a part is unknown or repeated, there is none, or a size is not positive.

    >>> import torch
    >>> PatternMixer(64, 2, parts=("disc", "cells"), radius=3)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        parts: Sequence[str] = ("row", "column"),
        count_once: bool = True,
        radius: int = 8,
        cell_size: int = 4,
        summary_columns: int = 1,
        qkv_bias: bool = True,
        kv_heads: int | None = None,
    ):
        super().__init__(dim, num_heads, kv_heads=kv_heads)
        if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(self.PARTS):
            raise ValueError(f"PatternMixer: parts must be different names of {tuple(self.PARTS)}, got {parts=}")
        if min(radius, cell_size, summary_columns) < 1:
            raise ValueError(
                f"PatternMixer: radius, cell_size and summary_columns must be positive, got {radius=}, {cell_size=} "
                f"and {summary_columns=}"
            )
        self.parts, self.count_once = tuple(parts), count_once
        self.radius, self.cell_size, self.summary_columns = radius, cell_size, summary_columns
        self.qkv = nn.Linear(dim, self.qkv_dim, bias=qkv_bias)
        self.cell_weight = (
            nn.Parameter(torch.full((cell_size, cell_size), cell_size**-2.0)) if "cells" in parts else None
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        q, k, v = (t.permute(0, 3, 1, 2, 4) for t in self.split_heads(self.qkv(x)))
        out = self._attend(q, k, v)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(3))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what queries see, [B, G, H, W, D] like queries, keys and values."""
        dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        with without_autocast(q.device):
            q, k, v = q.to(wide) * self.head_dim**-0.5, k.to(wide), v.to(wide)
            seen = [self.PARTS[name](self, q, k, v) for name in self.parts]
            scores = [self._hide(index, part) for index, part in enumerate(seen)]
            weights = torch.cat(scores, -1).softmax(-1).split([s.shape[-1] for s in scores], -1)
            shares = (part.values(some) for part, some in zip(seen, weights, strict=True))
            out = sum(shares, q.new_zeros(()))
        return out.to(dtype)

    def _hide(self, index: int, part: Seen) -> Tensor:
        """Return a part's scores, those of keys it has not, or that parts before it have, below all others."""
        if part.rows is None or part.columns is None:
            return part.scores
        height, width = part.scores.shape[2:4]
        rows, columns = (torch.arange(side, device=part.scores.device) for side in (height, width))
        at = (rows[:, None, None], columns[:, None], part.rows, part.columns)
        shown = (part.rows >= 0) & (part.rows < height) & (part.columns >= 0) & (part.columns < width)
        shown = shown & self._shows(self.parts[index], at, width)
        if self.count_once:
            for name in self.parts[:index]:
                if name in self.TOKENS:
                    shown = shown & ~self._shows(name, at, width)
        return part.scores.masked_fill(~shown, float("-inf"))

    def _shows(self, name: str, at: tuple[Tensor, Tensor, Tensor, Tensor], width: int) -> Tensor:
        """Whether a part shows tokens to queries; `at` are the queries' rows and columns and the tokens'."""
        row, column, rows, columns = at
        if name == "row":
            return rows == row
        if name == "column":
            return columns == column
        if name == "band":
            return ((rows - row) * width + columns - column).abs() < width
        if name == "last_columns":
            return columns >= width - self.summary_columns
        return (rows - row).square() + (columns - column).square() < self.radius**2

    def _row(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        at = torch.arange(k.shape[2], device=q.device)[:, None, None], torch.arange(k.shape[3], device=q.device)
        return replaced(_along_rows(q, k, v), rows=at[0], columns=at[1])

    def _column(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        at = torch.arange(k.shape[2], device=q.device), torch.arange(k.shape[3], device=q.device)[:, None]
        return replaced(_turned(_along_rows(*_turn(q, k, v))), rows=at[0], columns=at[1])

    def _band(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        height, width = k.shape[2:4]
        k, v = (
            torch.cat([padded[:, :, step : step + height] for step in range(3)], 3)
            for padded in (F.pad(t, (0, 0, 0, 0, 1, 1)) for t in (k, v))
        )
        rows, columns = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
        rows = rows[:, None, None] + torch.arange(-1, 2, device=q.device).repeat_interleave(width)
        return replaced(_along_rows(q, k, v), rows=rows, columns=columns.repeat(3))

    def _last_columns(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        height, width = k.shape[2:4]
        rows, columns = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
        columns = columns[-self.summary_columns :]
        k, v = (t[:, :, :, -self.summary_columns :].flatten(2, 3) for t in (k, v))
        rows = rows.repeat_interleave(len(columns))
        return replaced(_for_all(q, k, v), rows=rows, columns=columns.repeat(height))

    def _disc(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        # Offset by offset: windows of keys at once would hold as many maps as there are offsets.
        height, width = k.shape[2:4]
        reach = self.radius - 1
        # how far the disc goes to the left and right, row by row
        sides = [(dy, isqrt(self.radius**2 - 1 - dy**2)) for dy in range(-reach, reach + 1)]
        steps = [(dy, dx) for dy, side in sides for dx in range(-side, side + 1)]
        k, v = (F.pad(t, (0, 0, *[reach] * 4)) for t in (k, v))

        def moved(x: Tensor, step: tuple[int, int]) -> Tensor:
            top, left = reach + step[0], reach + step[1]
            return x[:, :, top : top + height, left : left + width]

        def values(weights: Tensor) -> Tensor:
            out = torch.zeros((), dtype=v.dtype, device=v.device)
            for step, weight in zip(steps, weights.unbind(-1), strict=True):
                out = out + weight[..., None] * moved(v, step)
            return out

        scores = torch.stack([(q * moved(k, step)).sum(-1) for step in steps], -1)
        rows, columns = (torch.arange(side, device=q.device) for side in (height, width))
        dy = torch.cat([torch.full((2 * side + 1,), dy, device=q.device) for dy, side in sides])
        dx = torch.cat([torch.arange(-side, side + 1, device=q.device) for _, side in sides])
        return Seen(scores, values, rows[:, None, None] + dy, columns[:, None] + dx)

    def _cells(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        assert self.cell_weight is not None
        side, weight = self.cell_size, self.cell_weight.to(k.dtype)[:, None, :, None]
        missing = [-size % side for size in k.shape[2:4]]

        def sums(x: Tensor) -> Tensor:
            x = F.pad(x, (0, 0, 0, missing[1], 0, missing[0]))
            cells = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, G, H', side, W', side, D]
            return (cells * weight).sum((3, 5)).flatten(2, 3)

        return _for_all(q, sums(k), sums(v))

    def _row_summaries(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        asks, keys = q.amax(3, keepdim=True), k.amax(3)
        values = (asks @ k.transpose(-2, -1)).softmax(-1) @ v  # [B, G, H, 1, D]
        return _for_all(q, keys, values.squeeze(3))

    def _above(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        return _along_rows(q, *_summed_before(q, k, v))

    def _below(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        keys, values = _summed_before(*(t.flip(2) for t in (q, k, v)))
        return _along_rows(q, keys.flip(2), values.flip(2))

    def _left(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        return _turned(self._above(*_turn(q, k, v)))

    def _right(self, q: Tensor, k: Tensor, v: Tensor) -> Seen:
        return _turned(self._below(*_turn(q, k, v)))

    PARTS: dict[str, Callable[[PatternMixer, Tensor, Tensor, Tensor], Seen]] = {
        "row": _row,
        "column": _column,
        "band": _band,
        "last_columns": _last_columns,
        "disc": _disc,
        "cells": _cells,
        "row_summaries": _row_summaries,
        "above": _above,
        "below": _below,
        "left": _left,
        "right": _right,
    }
    TOKENS = ("row", "column", "band", "last_columns", "disc")  # parts that show tokens, not summaries


def _along_rows(q: Tensor, k: Tensor, v: Tensor) -> Seen:
    """Show queries [B, G, H, W, D] the keys of their row, [B, G, H, M, D]."""
    return Seen(q @ k.transpose(-2, -1), lambda weights: weights @ v)


def _for_all(q: Tensor, k: Tensor, v: Tensor) -> Seen:
    """Show queries [B, G, H, W, D] the same keys [B, G, M, D]."""
    size = q.shape[2:4]
    scores = (q.flatten(2, 3) @ k.transpose(-2, -1)).unflatten(2, size)
    return Seen(scores, lambda weights: (weights.flatten(2, 3) @ v).unflatten(2, size))


def _turn(*maps: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(2, 3) for x in maps)


def _turned(seen: Seen) -> Seen:
    """Exchange rows and columns of what was seen on a map whose own were exchanged."""
    return Seen(seen.scores.transpose(2, 3), lambda weights: seen.values(weights.transpose(2, 3)).transpose(2, 3))


def _summed_before(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """For each token one key and one value of the tokens above it, [B, G, H, W, D] like queries, keys and values."""
    asks, keys = (F.pad(t[:, :, :-1], (0, 0, 0, 0, 1, 0)).cumsum(2) for t in (q, k))
    columns_k, columns_v = _turn(k, v)
    scores = asks.transpose(2, 3) @ columns_k.transpose(-2, -1)  # [B, G, W, H, H]
    height = scores.shape[-1]
    index = torch.arange(height, device=q.device)
    hidden = (index >= index[:, None]) & (index[:, None] > 0)  # the first sees all, with scores of 0
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return keys, (weights @ columns_v).transpose(2, 3)
