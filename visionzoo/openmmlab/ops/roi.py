"""Pooling of regions of interest, [K, 5] as image index, x1, y1, x2, y2, from [B, C, H, W]."""

from __future__ import annotations

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor
from torchvision.ops import roi_align

from visionzoo.openmmlab.ops.call import compute_dtype, gradients


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill `output` [K, C, aligned_height, aligned_width]; `pool_mode` is 1, the mean of the samples.

    Raises:
        NotImplementedError: if the mode is 0, the maximum.
    """
    _require_mean(pool_mode)
    dtype = compute_dtype(input)
    size = (aligned_height, aligned_width)
    output.copy_(roi_align(input.to(dtype), rois.to(dtype), size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill `grad_input` [B, C, H, W]; the arguments are those of `roi_align_forward`."""
    _require_mean(pool_mode)
    rois, size = rois.to(compute_dtype(grad_input)), (aligned_height, aligned_width)
    # linear in the input: its values do not matter for the gradient
    (grad,) = gradients(
        lambda x: roi_align(x, rois, size, spatial_scale, sampling_ratio, aligned), [grad_input], grad_output
    )
    grad_input.copy_(grad)


def _require_mean(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            "RoIAlign with pool_mode='max' is not served without mmcv's compiled extension; use pool_mode='avg'"
        )


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill `output` [K, C, pooled_height, pooled_width] with maxima and `argmax` with where in the map they are."""
    dtype = compute_dtype(input)
    values, where = torch.ops.torchvision.roi_pool(
        input.to(dtype), rois.to(dtype), spatial_scale, pooled_height, pooled_width
    )
    output.copy_(values)
    argmax.copy_(where)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradients of the maxima to `grad_input` [B, C, H, W], which is 0, where the maxima were."""
    channels, height, width = grad_input.shape[1:]
    image = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)
    index = image[:, :, None, None] * (height * width) + argmax
    filled = argmax >= 0  # regions may have empty cells
    grad_input.view(-1).index_add_(0, index[filled], grad_output.to(grad_input.dtype)[filled])
