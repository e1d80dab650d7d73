"""Specification of channel attention, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.kernels.precision import without_autocast


def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attention of [B, H, W, G, D] as `channel_attention` says; batched matrix products copy what is not contiguous."""
    size, dtype = q.shape[1:3], q.dtype
    accumulate = torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(accumulate).flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # [B, G, N, D]
    with without_autocast(q.device):
        scores = (k * scale).transpose(-2, -1) @ v  # [B, G, D, D]
        out = q @ scores.softmax(dim=-1).transpose(-2, -1)
    return out.transpose(1, 2).unflatten(1, size).to(dtype)
