"""Efficient local attention (ELA, arXiv:2403.01123): gates of rows and columns from one-dimensional convolutions.

There is no code of the authors. Convolution and norm shared by both directions, and the absence of a bias, are those
of the class that public repositories copy from each other, its origin and license unknown; the settings of the variants
are the paper's. The code here is our own. timm's `EfficientLocalAttn` is another function: it has convolutions and
norms of their own for each direction, a norm of one group, and a SiLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.layers.gates.base import Gate
from visionzoo.layers.norm import in_groups


class ElaGate(Gate):
    """Scale rows and columns by a convolution of their means along the other axis; O(N·C + (H + W)·C·k·C / groups).

    The mean over the width passes a convolution along the height, group norm (over the height too) and a sigmoid, and
    the same layers do it the other way round. Everything has the dtype of the input or of autocast; statistics of
    the norm are float32 at least.

    Args:
        dim: channels C.
        variant: "t", "b", "s" or "l", the paper's, which set what follows: kernels of 5, 7, 5, 7; C, C, C/8, C/8
            groups of the convolution; 32, 16, 16, 16 groups of the norm.
        kernel_size: of the convolution, odd; None for the variant's.
        conv_groups: channel groups of the convolution; None for the variant's.
        norm_groups: channel groups of the norm; None for the variant's.

    Raises:
        ValueError: if the variant is unknown, groups do not divide the channels, or the kernel is even.

    >>> import torch
    >>> ElaGate(64, variant="l")(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    VARIANTS = {"t": (5, 1, 32), "b": (7, 1, 16), "s": (5, 8, 16), "l": (7, 8, 16)}

    def __init__(
        self,
        dim: int,
        *,
        variant: str = "b",
        kernel_size: int | None = None,
        conv_groups: int | None = None,
        norm_groups: int | None = None,
    ):
        super().__init__(dim)
        if variant not in self.VARIANTS:
            raise ValueError(f"ElaGate: variant must be one of {tuple(self.VARIANTS)}, got {variant=}")
        kernel, group_width, groups = self.VARIANTS[variant]
        kernel_size = kernel if kernel_size is None else kernel_size
        if conv_groups is None and dim % group_width:
            raise ValueError(
                f"ElaGate: the groups of {variant=} have {group_width} channels, which do not divide {dim=}; "
                f"pass conv_groups"
            )
        conv_groups = dim // group_width if conv_groups is None else conv_groups
        norm_groups = groups if norm_groups is None else norm_groups
        self.check_kernels(kernel_size=kernel_size)
        self.check_divides(dim, conv_groups=conv_groups, norm_groups=norm_groups)
        self.conv = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=conv_groups, bias=False)
        self.norm = nn.GroupNorm(norm_groups, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        means = (self.conv(x.mean(axis).transpose(1, 2)) for axis in (2, 1))
        rows, columns = (torch.sigmoid(in_groups(self.norm, mean)) for mean in means)
        factor = rows.transpose(1, 2)[:, :, None] * columns.transpose(1, 2)[:, None]
        return x * factor.to(x.dtype)
