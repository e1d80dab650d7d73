"""Specification of halo attention, in plain torch; runs in any floating dtype and under autograd.

All is computed in float32 at least, from one rounding of the inputs to one of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzoo.kernels.precision import without_autocast
from visionzoo.kernels.regions import cut, from_regions, to_regions


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    *,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
    mask_padding: bool,
) -> Tensor:
    """Attention of [B, H, W, G, D] tensors as `halo_attention` says; copies K and V of each block's window."""
    dtype, accumulate = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, rel_height, rel_width = (t.to(accumulate) for t in (q, k, v, rel_height, rel_width))
    height, width = k.shape[1:3]
    blocks = (-(-height // block_size), -(-width // block_size))
    side, window = block_size // stride, block_size + 2 * halo_size  # of a block's queries, of its keys
    size = (blocks[0] * side, blocks[1] * side)
    padded = F.pad(q, (0, 0, 0, 0, 0, size[1] - q.shape[2], 0, size[0] - q.shape[1]))
    queries = to_regions(padded, blocks).transpose(2, 3)  # [B, R, G, side², D]
    keys, values = (_windows(t, blocks, block_size, halo_size) for t in (k, v))  # [B, R, G, D, window²]

    offset = torch.arange(window, device=q.device) - torch.arange(side, device=q.device)[:, None] + window - 1
    grid = queries.unflatten(3, (side, side))
    with without_autocast(q.device):
        vertical = torch.einsum("brgijd,iyd->brgijy", grid, rel_height[offset])
        horizontal = torch.einsum("brgijd,jxd->brgijx", grid, rel_width[offset])
        positions = (vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)).flatten(5).flatten(3, 4)
        scores = (queries * scale) @ keys + positions  # [B, R, G, side², window²]
        if mask_padding:
            inside = _windows(k.new_ones(1, height, width, 1, 1), blocks, block_size, halo_size) > 0
            scores = scores.masked_fill(~inside, torch.finfo(accumulate).min)
        out = scores.softmax(-1) @ values.transpose(-2, -1)
    return cut(from_regions(out.transpose(2, 3).to(dtype), blocks, size), (0, 0), q.shape[1:3])


def _windows(x: Tensor, blocks: tuple[int, int], block_size: int, halo_size: int) -> Tensor:
    """[B, H, W, G, D] to [B, R, G, D, window²]: each block's tokens and those around it, zeros beyond the map."""
    bottom, right = blocks[0] * block_size - x.shape[1], blocks[1] * block_size - x.shape[2]
    x = F.pad(x, (0, 0, 0, 0, halo_size, halo_size + right, halo_size, halo_size + bottom))
    window = block_size + 2 * halo_size
    return x.unfold(1, window, block_size).unfold(2, window, block_size).flatten(5).flatten(1, 2)
