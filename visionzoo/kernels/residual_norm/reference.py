"""Specification of a residual sum and its layer norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzoo.kernels.precision import without_autocast


def forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    *,
    eps: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Add [B, ..., C] in `dtype` and normalize the sum as `residual_norm` says."""
    if factor is not None:
        factor = factor.view(-1, *[1] * (x.ndim - 1))
        wide = torch.promote_types(factor.dtype, torch.float32)
        scale = factor if scale is None else scale.to(wide) * factor
    with without_autocast(x.device):
        y = x + branch if scale is None else torch.addcmul(x, branch, scale)
        y = y.to(dtype)
        wide = torch.promote_types(torch.promote_types(dtype, weight.dtype), bias.dtype)  # torch takes one dtype only
        out = F.layer_norm(y.to(wide), y.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y, out.to(out_dtype)
