"""Stems: from the image to the first map."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.nhwc import BatchNormNHWC, MaxPoolNHWC


def conv_stem(
    in_chans: int, dims: Sequence[int], kernel_size: int, act_layer: type[nn.Module], *, pool: bool
) -> nn.Sequential:
    """Build the stem of a residual network: [B, H, W, in_chans] to [B, ⌈H / 4⌉, ⌈W / 4⌉, dims[-1]].

    Convolutions to `dims` channels, each with batch norm and activation, the first with stride 2; then max pooling,
    or without `pool` a stride of 2 in the last convolution.
    """
    layers: list[nn.Module] = []
    for i, dim in enumerate(dims):
        stride = 2 if i == 0 or (i == len(dims) - 1 and not pool) else 1
        layers += [
            ConvNorm(
                dims[i - 1] if i else in_chans,
                dim,
                kernel_size,
                stride,
                kernel_size // 2,
                bias=False,
                norm_layer=BatchNormNHWC,
            ),
            act_layer(),
        ]
    return nn.Sequential(*layers, *([MaxPoolNHWC(3, 2, 1)] if pool else []))
