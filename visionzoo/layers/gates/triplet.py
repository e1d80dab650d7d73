"""Triplet attention (Misra et al., arXiv:2010.03045): a spatial gate on each of a map's three sides.

Facts from triplet_attention.py of https://github.com/LandskapeAI/triplet-attention at f07524e (MIT license); the code
here is our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.layers.gates.base import Gate
from visionzoo.layers.gates.cbam import SpatialConv, max_and_mean


class TripletGate(Gate):
    """Scale by the mean of three gates, over the height, the width and the channels; O(N·C + (N + H·C + W·C)·k²).

    Each gate takes maximum and mean along its axis, a k×k convolution over the other two with batch norm, and a
    sigmoid. Everything has the dtype of the input or of autocast. The cost grows with N·C only.

    Args:
        dim: channels C.
        kernel_size: side of the kernels, odd.
        spatial: have the gate over the channels too; without it the mean is of the other two.

    Raises:
        ValueError: if the kernel is even.

    >>> import torch
    >>> TripletGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, kernel_size: int = 7, spatial: bool = True):
        super().__init__(dim)
        self.check_kernels(kernel_size=kernel_size)
        self.over_height = SpatialConv(kernel_size)
        self.over_width = SpatialConv(kernel_size)
        self.over_channels = SpatialConv(kernel_size) if spatial else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        height = self.over_height(max_and_mean(x, 1).transpose(1, 2).contiguous())  # [B, C, W, 1]
        width = self.over_width(max_and_mean(x, 2))  # [B, H, C, 1]
        factor = torch.sigmoid(height).permute(0, 3, 2, 1) + torch.sigmoid(width).transpose(2, 3)
        if self.over_channels is None:
            return x * (factor / 2)
        return x * ((factor + torch.sigmoid(self.over_channels(max_and_mean(x, 3)))) / 3)
