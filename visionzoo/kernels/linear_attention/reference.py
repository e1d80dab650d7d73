"""Specification of linear attention, in plain torch; runs in any floating dtype and under autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzoo.kernels.precision import without_autocast


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str,
    focusing_factor: float,
    temperature: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Attention of [B, H, W, G, D] tensors as `linear_attention` says, and the mean weights [B, H, W, G]."""
    size, dtype = q.shape[1:3], v.dtype
    accumulate = torch.promote_types(torch.promote_types(q.dtype, dtype), torch.float32)
    with without_autocast(q.device):
        q, k, v = (t.to(accumulate).flatten(1, 2) for t in (q, k, v))  # [B, N, G, D]
        if feature_map == "softmax":
            q, k = q.softmax(-1), k.softmax(1) * k.shape[1]
        elif feature_map == "focused":
            temperature = None if temperature is None else temperature.to(accumulate)
            q, k = (_focus(t, focusing_factor, temperature) for t in (q, k))
        elif feature_map != "identity":
            q, k = (F.relu(t) if feature_map == "relu" else F.elu(t) + 1 for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, G, N, D]
        state = k.transpose(-2, -1) @ (v / k.shape[-2])  # [B, G, D, V]
        total = q @ k.mean(-2).unsqueeze(-1)  # [B, G, N, 1]
        out = (q @ state) / (total + eps)
    out, total = (t.transpose(1, 2).unflatten(1, size) for t in (out, total))
    return out.to(dtype), total.squeeze(-1)


def _focus(x: Tensor, factor: float, temperature: Tensor | None) -> Tensor:
    """Features of [B, N, G, D]; the power is taken of unit vectors, since that of the numbers themselves underflows."""
    x = F.relu(x) + 1e-6
    if temperature is not None:
        x = x / temperature
    length = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    power = (x / length) ** factor
    return power * (length / torch.linalg.vector_norm(power, dim=(-2, -1), keepdim=True))
