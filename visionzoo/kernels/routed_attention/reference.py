"""Specification of routed attention, in plain torch; runs in any floating dtype and under autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.kernels.regions import from_regions, to_regions, valid_tokens


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    *,
    regions: tuple[int, int],
    scale: float,
    valid_size: tuple[int, int] | None,
) -> Tensor:
    """Attention of [B, H, W, G, D] tensors as `routed_attention` says; copies K and V once for each listed region."""
    size = (q.shape[1], q.shape[2])
    q_regions, k_regions, v_regions = (to_regions(t, regions).transpose(2, 3) for t in (q, k, v))  # [B, R, G, n, D]
    keep = None if valid_size is None else valid_tokens(size, valid_size, regions, q.device)  # [R, n]
    if index is not None:
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
        # [B, R, K, G, n, D] -> [B, R, G, K·n, D]
        k_regions, v_regions = (t[batch, index].transpose(2, 3).flatten(3, 4) for t in (k_regions, v_regions))
        keep = None if keep is None else keep[index].flatten(2)  # [B, R, K·n]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = (q_regions * scale) @ k_regions.transpose(-2, -1)  # [B, R, G, n, K·n]
    scores = scores.to(accumulate)
    if keep is None:
        weights = scores.softmax(-1)
    else:  # the smallest finite score, not -inf: rows without any key must have finite gradients
        out_of_map = ~keep.unsqueeze(-2).unsqueeze(-2)
        weights = scores.masked_fill(out_of_map, torch.finfo(accumulate).min).softmax(-1).masked_fill(out_of_map, 0)
    out = weights.to(q.dtype) @ v_regions
    return from_regions(out.transpose(2, 3), regions, size)
