"""Stems that several families share."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.nhwc import BatchNormNHWC


def conv_stem(in_chans: int, dim: int, act_layer: type[nn.Module]) -> nn.Sequential:
    """Four 3×3 convolutions of stride 2, each batch-normalised: [B, H, W, in_chans] to [B, ⌈H/16⌉, ⌈W/16⌉, dim].

    Widths are dim / 8, dim / 4, dim / 2, dim, and an activation stands between the convolutions.
    """
    widths = [in_chans, dim // 8, dim // 4, dim // 2, dim]
    layers: list[nn.Module] = []
    for in_dim, out_dim in pairwise(widths):
        layers += [ConvNorm(in_dim, out_dim, 3, 2, 1, bias=False, norm_layer=BatchNormNHWC), act_layer()]
    return nn.Sequential(*layers[:-1])
