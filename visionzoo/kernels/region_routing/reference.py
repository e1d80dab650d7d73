"""Specification of region routing."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.kernels.precision import without_autocast
from visionzoo.kernels.regions import to_regions, valid_tokens


@torch.no_grad()
def forward(
    q: Tensor, k: Tensor, *, regions: tuple[int, int], topk: int, scale: float, valid_size: tuple[int, int] | None
) -> Tensor:
    """Region means, their scores, and the best `topk` of a stable sort: [B, R, topk] from [B, H, W, G, D]."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    q_regions, k_regions = (to_regions(t.flatten(3).to(accumulate), regions) for t in (q, k))  # [B, R, n, C]
    if valid_size is None:
        q_mean, k_mean = q_regions.mean(2), k_regions.mean(2)
    else:
        valid = valid_tokens((q.shape[1], q.shape[2]), valid_size, regions, q.device)
        count = valid.sum(1).clamp(min=1)[:, None]  # a region of only padding has mean 0
        q_mean, k_mean = ((t * valid[..., None]).sum(2) / count for t in (q_regions, k_regions))
    with without_autocast(q.device):
        scores = (q_mean * scale) @ k_mean.transpose(1, 2)
    if valid_size is not None:
        scores = scores.masked_fill(~valid.any(1), -torch.inf)
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort; of equals its TopK takes the first, too
        return scores.topk(topk, dim=-1).indices
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
