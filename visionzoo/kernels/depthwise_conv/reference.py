"""Specification of the depthwise convolution: torch's own, on views; runs in any floating dtype and under autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None, regions: tuple[int, int] | None
) -> Tensor:
    """Convolution of [B, H, W, C] as `depthwise_conv` says; regions cost a copy before it and one after."""
    padding, channels = weight.shape[-1] // 2, x.shape[-1]
    if regions is None:
        out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=channels).permute(0, 2, 3, 1)
    else:
        # [B, H, W, C] -> [B, rows, columns, H / rows, W / columns, C], each region as a sample
        cut = x.unflatten(2, (regions[1], -1)).unflatten(1, (regions[0], -1)).transpose(2, 3)
        parts = cut.flatten(0, 2).permute(0, 3, 1, 2)
        parts = F.conv2d(parts, weight, bias, padding=padding, groups=channels).permute(0, 2, 3, 1)
        out = parts.reshape(cut.shape).transpose(2, 3).reshape(x.shape)
    return out if residual is None else residual + out
