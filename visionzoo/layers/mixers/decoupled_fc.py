"""Decoupled fully connected attention's mixing of tokens (DFC, GhostNetV2, arXiv:2211.12905)."""

from __future__ import annotations

from torch import Tensor, nn

from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import on_nchw


class DecoupledFcMixer(Mixer):
    """Depthwise convolution along each row, then along each column, each with a batch norm.

        y = BN(conv(BN(conv(x)))), depthwise, with 1 × k, then k × 1 places

    Time: O(N·C·k); memory: O(N·C).

    Everything has the dtype of the input or of autocast; the norms' statistics are kept in the parameters' dtype.

    Facts from https://github.com/huawei-noah/Efficient-AI-Backbones at f90e129 (no licence in its folder).

    Args:
        dim: channels C.
        num_heads: ignored, for the shared signature.
        kernel_size: length k of the kernels, odd.

    Raises:
        ValueError: if the kernels' length is even.

    >>> import torch
    >>> DecoupledFcMixer(8)(torch.randn(1, 5, 7, 8)).shape
    torch.Size([1, 5, 7, 8])
    """

    def __init__(self, dim: int, num_heads: int | None = None, *, kernel_size: int = 5):
        super().__init__(dim, 1)
        self.check_kernels(kernel_size=kernel_size)
        self.layers = nn.Sequential()
        for kernel in ((1, kernel_size), (kernel_size, 1)):
            padding = (kernel[0] // 2, kernel[1] // 2)
            self.layers.append(nn.Conv2d(dim, dim, kernel, padding=padding, groups=dim, bias=False))
            self.layers.append(nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        return on_nchw(self.layers, x)
