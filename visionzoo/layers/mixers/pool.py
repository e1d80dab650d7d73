"""Average pooling as token mixer (PoolFormer, arXiv:2111.11418)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visionzoo.layers.mixers.base import Mixer


class PoolMixer(Mixer):
    """Mean over a square neighbourhood, minus the token itself; no parameters, in the dtype of the input.

        yᵢ = mean over the k × k nearest of x - xᵢ

    Time: O(N·C·k²); memory: O(N·C).

    Facts from https://github.com/sail-sg/poolformer at a075575 (Apache-2.0).

    Args:
        dim: channels; only checked.
        num_heads: ignored, for the shared signature.
        pool_size: side of the neighbourhood, odd; positions beyond the border are not counted.

    Raises:
        ValueError: if the neighbourhood's side is even.

    >>> import torch
    >>> PoolMixer(8)(torch.ones(1, 5, 7, 8)).abs().max().item()
    0.0
    """

    def __init__(self, dim: int, num_heads: int | None = None, *, pool_size: int = 3):
        super().__init__(dim, 1)
        self.check_kernels(pool_size=pool_size)
        self.pool_size = pool_size

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        mean = F.avg_pool2d(
            x.permute(0, 3, 1, 2), self.pool_size, stride=1, padding=self.pool_size // 2, count_include_pad=False
        )
        return mean.permute(0, 2, 3, 1) - x
