"""Deformable convolution (arXiv:1703.06211, modulated: arXiv:1811.11168) and attention (arXiv:2010.04159).

Where a sample lies just one pixel outside the map, the derivative by its position is one-sided: torchvision gives that
from inside, mmcv's kernels give 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchvision.ops import deform_conv2d

from visionzoo.openmmlab.ops.call import compute_dtype, gradients


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: Any
) -> None:
    """Fill `output` [B, C_out, H', W'] from [B, C_in, H, W] sampled at kernel positions moved by `offset`.

    The buffers `columns` and `ones` are not needed. `geometry` has kernel sizes, strides (dW, dH), paddings and
    dilations; groups follow from the shapes.
    """
    x, weight, offset = (tensor.to(compute_dtype(input)) for tensor in (input, weight, offset))
    output.copy_(_conv(**geometry)(x, offset, weight))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: Any,
) -> None:
    """Fill `grad_input` and `grad_offset`."""
    weight = weight.to(compute_dtype(input))
    conv = _conv(**geometry)
    grads = gradients(lambda x, offset: conv(x, offset, weight), [input, offset], grad_output)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float,
    **geometry: Any,
) -> None:
    """Add `scale` times the gradient to `grad_weight`."""
    x, offset = input.to(compute_dtype(input)), offset.to(compute_dtype(input))
    conv = _conv(**geometry)
    # linear in the weight: its values do not matter for the gradient
    (grad,) = gradients(lambda weight: conv(x, offset, weight), [grad_weight], grad_output)
    grad_weight.add_(grad.to(grad_weight.dtype), alpha=scale)


def _conv(
    *, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int, **_: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def conv(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(x, offset, weight, stride=(dH, dW), padding=(padH, padW), dilation=(dilationH, dilationW))

    return conv


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    with_bias: bool,
    **geometry: Any,
) -> None:
    """Fill `output` [B, C_out, H', W']; every sample is scaled by `mask`."""
    x, weight, bias, offset, mask = (t.to(compute_dtype(input)) for t in (input, weight, bias, offset, mask))
    output.copy_(_modulated_conv(with_bias, **geometry)(x, weight, bias, offset, mask))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **geometry: Any,
) -> None:
    """Fill the five gradients; that of the bias if there is one."""
    targets = [grad_input, grad_weight, grad_offset, grad_mask]
    conv = _modulated_conv(with_bias, **geometry)
    if with_bias:
        grads = gradients(conv, [input, weight, bias, offset, mask], grad_output)
        targets.insert(2, grad_bias)
    else:
        grads = gradients(
            lambda x, weight, offset, mask: conv(x, weight, bias, offset, mask),
            [input, weight, offset, mask],
            grad_output,
        )
    for target, grad in zip(targets, grads, strict=True):
        target.copy_(grad)


def _modulated_conv(
    with_bias: bool, *, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int, **_: int
) -> Callable[..., Tensor]:
    def conv(x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(
            x,
            offset,
            weight,
            bias if with_bias else None,
            stride=(stride_h, stride_w),
            padding=(pad_h, pad_w),
            dilation=(dilation_h, dilation_w),
            mask=mask,
        )

    return conv


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    im2col_step: int,
) -> Tensor:
    """Weighted mean of values sampled on maps of several scales.

    Args:
        value: [B, N, G, D], the maps' pixels one after the other, N in all.
        spatial_shapes: [levels, 2], height and width of each map.
        level_start_index: [levels], where each map begins in N.
        sampling_locations: [B, Q, G, levels, points, 2], x and y from 0 to 1.
        attention_weights: [B, Q, G, levels, points].
        im2col_step: not needed.

    Returns:
        [B, Q, G·D].
    """
    inputs = (tensor.to(compute_dtype(value)) for tensor in (value, sampling_locations, attention_weights))
    return _attention(spatial_shapes)(*inputs).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    *,
    im2col_step: int,
) -> None:
    """Fill the three gradients."""
    grads = gradients(_attention(spatial_shapes), [value, sampling_locations, attention_weights], grad_output)
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        target.copy_(grad)


def _attention(spatial_shapes: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # mmcv's own, for where it has no

    shapes = spatial_shapes.tolist()  # once, not an element at a time from the GPU
    return lambda value, locations, weights: multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
