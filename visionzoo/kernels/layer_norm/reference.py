"""Specification of layer normalization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Normalize [..., C] as `layer_norm` says."""
    if not x.dtype == weight.dtype == bias.dtype:  # torch takes one dtype only, and has float32 statistics in each
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), bias.dtype)
        x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(out_dtype)
