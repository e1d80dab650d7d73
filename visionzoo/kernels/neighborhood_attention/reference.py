"""Specification of neighborhood attention, in plain torch; runs in any floating dtype and under autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of [B, H, W, G, D] tensors as `neighborhood_attention` says.

    Copies K and V once for each neighbor, kernel_size² times: 64 channels of a 200×334 map in float32 with a kernel
    of 7 are 17 MB of keys and 838 MB of their copies.
    """
    size = height, width = q.shape[1], q.shape[2]
    rows, row_offsets = neighbors(height, kernel_size[0], dilation[0], q.device)
    columns, column_offsets = neighbors(width, kernel_size[1], dilation[1], q.device)
    index = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten()  # [N·n] for n neighbors
    count = kernel_size[0] * kernel_size[1]
    queries, keys, values = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # [B, G, N, D]
    keys, values = (t.index_select(2, index).unflatten(2, (-1, count)) for t in (keys, values))  # [B, G, N, n, D]

    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = (keys @ (queries * scale).unsqueeze(-1)).squeeze(-1).to(accumulate)  # [B, G, N, n]
    if bias is not None:
        table = bias.to(accumulate)
        table = table.index_select(1, row_offsets.flatten()).index_select(2, column_offsets.flatten())
        table = table.unflatten(2, (-1, kernel_size[1])).unflatten(1, (-1, kernel_size[0]))  # [G, H, kh, W, kw]
        scores = scores + table.transpose(2, 3).flatten(3).flatten(1, 2)
    out = scores.softmax(-1).to(q.dtype).unsqueeze(-2) @ values  # [B, G, N, 1, D]
    return out.squeeze(-2).transpose(1, 2).unflatten(1, size)


def neighbors(length: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which places along an axis the token at each place sees, and where each is in a table of offsets.

    Returns:
        int64 [length, kernel_size] each: places from 0 to length - 1 in rising order; indices from 0 (for the offset
        1 - kernel_size, in steps of the dilation) to 2·kernel_size - 2.
    """
    place = torch.arange(length, device=device)
    group, rank = place % dilation, place // dilation  # the map that the token is part of, its place there
    members = (length - group + dilation - 1) // dilation
    start = torch.minimum((rank - kernel_size // 2).clamp(min=0), members - kernel_size)
    seen = start[:, None] + torch.arange(kernel_size, device=device)
    return seen * dilation + group[:, None], seen - rank[:, None] + kernel_size - 1
