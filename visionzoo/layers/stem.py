"""Stems that several families share: from the image to the first map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.nhwc import BatchNormNHWC, MaxPoolNHWC


def conv_stem(
    in_chans: int,
    dims: Sequence[int],
    kernel_size: int,
    strides: Sequence[int],
    act_layer: type[nn.Module],
    *,
    last_act: bool = True,
    pool: bool = False,
) -> nn.Sequential:
    """Build a stem of batch-normalised convolutions: [B, H, W, in_chans] to [B, ⌈H/s⌉, ⌈W/s⌉, dims[-1]].

    Args:
        in_chans: image channels.
        dims: channels of each convolution.
        kernel_size: side of their kernels, odd.
        strides: stride of each; s above is their product, times 2 with `pool`.
        act_layer: activation after each convolution.
        last_act: whether the last has one too.
        pool: end with 3×3 max pooling of stride 2.
    """
    layers: list[nn.Module] = []
    for (in_dim, out_dim), stride in zip(pairwise((in_chans, *dims)), strides, strict=True):
        conv = ConvNorm(in_dim, out_dim, kernel_size, stride, kernel_size // 2, bias=False, norm_layer=BatchNormNHWC)
        layers += [conv, act_layer()]
    if not last_act:
        layers.pop()
    return nn.Sequential(*layers, *([MaxPoolNHWC(3, 2, 1)] if pool else []))
