"""Specification of the depthwise convolution: torch's own, on views; runs in any floating dtype and under autograd.

All is computed in float32 at least, from one rounding of the inputs to one of the output; in float16 many a CPU has no
convolution but one that takes hundreds of times as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzoo.kernels.precision import autocast_dtype, without_autocast


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None, regions: tuple[int, int] | None
) -> Tensor:
    """Convolution of [B, H, W, C] as `depthwise_conv` says; regions cost a copy before it and one after."""
    out_dtype = autocast_dtype(x.device) or x.dtype
    if residual is not None:
        out_dtype = torch.promote_types(out_dtype, residual.dtype)
    accumulate = torch.promote_types(out_dtype, torch.float32)
    x, weight = x.to(accumulate), weight.to(accumulate)
    bias = None if bias is None else bias.to(accumulate)
    with without_autocast(x.device):
        out = _convolve(x, weight, bias, regions)
    return (out if residual is None else residual + out).to(out_dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, regions: tuple[int, int] | None) -> Tensor:
    padding, channels = weight.shape[-1] // 2, x.shape[-1]
    if regions is None:
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=channels).permute(0, 2, 3, 1)
    # [B, H, W, C] -> [B, rows, columns, H / rows, W / columns, C], each region as a sample
    cut = x.unflatten(2, (regions[1], -1)).unflatten(1, (regions[0], -1)).transpose(2, 3)
    parts = cut.flatten(0, 2).permute(0, 3, 1, 2)
    parts = F.conv2d(parts, weight, bias, padding=padding, groups=channels).permute(0, 2, 3, 1)
    return parts.reshape(cut.shape).transpose(2, 3).reshape(x.shape)
