"""torch's NCHW layers on [B, H, W, C] maps, without copies.

Inside the zoo every map is [B, H, W, C] and contiguous. Its NCHW permutation is then exactly torch's
`channels_last` memory format, so these layers permute a view in, run torch's layer, and permute a view out.
Depthwise convolutions have kernels of their own. Parameters keep torch's names and shapes.
"""

from __future__ import annotations

import torch
from timm.layers import SqueezeExcite, register_notrace_module
from torch import Tensor, nn

from visionzoo.kernels import depthwise_conv, group_norm


@register_notrace_module  # as torch.fx does with torch's own layers
class ConvNHWC(nn.Conv2d):
    """`nn.Conv2d` from [B, H, W, C_in] to [B, H', W', C_out]."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a [B, H, W, C_in] map."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class DepthwiseConvNHWC(ConvNHWC):
    """Convolution of each channel of [B, H, W, C] with a kernel of its own, with zeros around the map.

    Args:
        dim: channels C.
        kernel_size: side of the kernels, odd.
        bias: whether it has a bias.

    Raises:
        ValueError: if the kernel is even or not positive.
    """

    def __init__(self, dim: int, kernel_size: int, *, bias: bool = True):
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"DepthwiseConvNHWC: kernel_size must be odd and positive, got {kernel_size=}")
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, regions: tuple[int, int] | None = None) -> Tensor:
        """Convolve a [B, H, W, C] map, or each of its regions by itself, and add `residual`, as `depthwise_conv`."""
        return depthwise_conv(x, self.weight, self.bias, residual=residual, regions=regions)


@register_notrace_module
class BatchNormNHWC(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the last axis of [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a [B, H, W, C] map."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class SyncBatchNormNHWC(nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` over the last axis of [B, H, W, C]: statistics of all processes' maps. Trains on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a [B, H, W, C] map."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class SqueezeExciteNHWC(SqueezeExcite):
    """timm's `SqueezeExcite` of [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of a [B, H, W, C] map."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class MaxPoolNHWC(nn.MaxPool2d):
    """`nn.MaxPool2d` of [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool a [B, H, W, C] map."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class AvgPoolNHWC(nn.AvgPool2d):
    """`nn.AvgPool2d` of [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool a [B, H, W, C] map."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class GroupNorm1(nn.Module):
    """Group normalisation with one group: statistics over height, width and channels of each sample.

    The same function as `nn.GroupNorm(1, dim)`, on [B, H, W, C], by `visionzoo.kernels.group_norm`. Under autocast the
    output has autocast's dtype, not float32.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a [B, H, W, C] map."""
        return group_norm(x, self.weight, self.bias, eps=self.eps)
