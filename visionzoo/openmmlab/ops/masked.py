"""The two halves of mmcv's masked convolution, which convolves at chosen pixels only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def masked_im2col_forward(
    features: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    columns: Tensor,
    *,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Fill `columns` [C·kernel_h·kernel_w, P] with the neighborhoods of P pixels of `features` [1, C, H, W]."""
    padded = F.pad(features, (pad_w, pad_w, pad_h, pad_h))[0]
    patches = padded.unfold(1, kernel_h, 1).unfold(2, kernel_w, 1)  # a view [C, H', W', kernel_h, kernel_w]
    chosen = patches[:, mask_h_idx, mask_w_idx]
    columns.copy_(chosen.permute(0, 2, 3, 1).flatten(0, 2))


def masked_col2im_forward(
    columns: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, output: Tensor, *, height: int, width: int, channels: int
) -> None:
    """Put `columns` [channels, P] at P pixels of `output` [1, channels, height, width]."""
    output[0, :, mask_h_idx, mask_w_idx] = columns
