"""Specification of neighborhood attention, in plain torch; runs in any floating dtype and under autograd.

Neighbors share most of their neighborhoods. So the queries of a tile, half a kernel along each axis or one stride,
attend together to the keys that their windows span, at most one and a half kernels along each axis, and a mask leaves
to each query those in its window. All is computed in float32 at least, from one rounding of the inputs to one of the
output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visionzoo.kernels.precision import without_autocast


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
    """Attention of [B, H, W, G, D] tensors as `neighborhood_attention` says.

    Copies K and V and holds scores: with a kernel of 7 there are 6.25 copies and 100 scores a token and head, where a
    gather of each token's keys and values would make 49 copies.
    """
    rows = _tile(q.shape[1], kernel_size[0], dilation[0], stride[0], q.device)
    columns = _tile(q.shape[2], kernel_size[1], dilation[1], stride[1], q.device)
    dtype, accumulate = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(accumulate) for t in (q, k, v))
    queries = _cut(q, rows.queries, columns.queries)  # [B, R, C, G, n, D] of R·C tiles with n queries
    keys, values = (_cut(t, rows.keys, columns.keys) for t in (k, v))  # [B, R, C, G, m, D] with m keys
    with without_autocast(q.device):
        scores = (queries * scale) @ keys.transpose(-2, -1)  # [B, R, C, G, n, m]
    if bias is not None:
        table = bias.to(accumulate).index_select(1, rows.offsets.flatten()).index_select(2, columns.offsets.flatten())
        table = table.unflatten(2, columns.offsets.shape).unflatten(1, rows.offsets.shape)
        scores = scores + table.permute(1, 4, 0, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)  # [R, C, G, n, m]
    seen = rows.seen[:, None, :, None, :, None] & columns.seen[None, :, None, :, None, :]
    seen = seen.flatten(4, 5).flatten(2, 3).unsqueeze(2)  # [R, C, 1, n, m]
    with without_autocast(q.device):
        out = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).to(dtype)
    out = out.unflatten(4, (rows.queries.shape[1], columns.queries.shape[1])).permute(0, 1, 4, 2, 5, 3, 6)
    return out.flatten(3, 4).flatten(1, 2).index_select(1, rows.back).index_select(2, columns.back)


class _Tiles(NamedTuple):
    """Tiles along an axis: T of them, with t queries and s = t + kernel_size - stride keys each."""

    queries: Tensor  # places [T, t]; the last tile of a group ends with repetitions of the group's last place
    keys: Tensor  # places [T, s], likewise
    offsets: Tensor  # from query to key, index into the table of biases [T, t, s]; some index where not seen
    seen: Tensor  # whether the key is in the query's window [T, t, s]
    back: Tensor  # index into the flattened `queries` for each place of the axis [length]


def _tile(length: int, kernel_size: int, dilation: int, stride: int, device: torch.device) -> _Tiles:
    side = max(1, (kernel_size + 1) // 2 // stride) * stride  # whole groups of queries that share a window
    group = torch.arange(dilation, device=device)[:, None, None]  # places that are equal modulo the dilation
    last = (length - 1 - group) // dilation  # rank of the last place of a group, which is a map of its own
    tiles = (length + side * dilation - 1) // (side * dilation)  # of the largest group
    ranks = torch.arange(tiles, device=device)[:, None] * side + torch.arange(side, device=device)
    ranks = torch.minimum(ranks, last)  # of the queries in their group [groups, tiles, t]
    leaders = ranks if stride == 1 else torch.minimum(ranks // stride * stride + stride // 2, last)
    first = torch.minimum((leaders - kernel_size // 2).clamp(min=0), last + 1 - kernel_size)  # of their windows
    keys = first[..., :1] + torch.arange(side + kernel_size - stride, device=device)  # [groups, tiles, s]
    into_window = keys[..., None, :] - first[..., None]
    offsets = keys[..., None, :] - ranks[..., None] + kernel_size - 1
    place = torch.arange(length, device=device)
    return _Tiles(
        queries=(ranks * dilation + group).flatten(0, 1),
        keys=(torch.minimum(keys, last) * dilation + group).flatten(0, 1),
        offsets=offsets.clamp(0, 2 * kernel_size - 2).flatten(0, 1),
        seen=((into_window >= 0) & (into_window < kernel_size)).flatten(0, 1),
        back=place % dilation * (tiles * side) + place // dilation,
    )


def _cut(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, H, W, G, D] to [B, R, C, G, n, D]: the tokens at `rows` [R, a] and `columns` [C, b], n = a·b of each tile."""
    x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    x = x.unflatten(2, columns.shape).unflatten(1, rows.shape)  # [B, R, a, C, b, G, D]
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)
