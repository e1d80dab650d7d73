"""Stems that several families share: from the image to the first map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.nhwc import OnNCHW, on_nhwc
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_multiple


class Stem(nn.ModuleList):
    """Layers on [B, H, W, C] that in turn make the first map of an image; no `nn.Sequential`, which is cut anywhere."""

    def __init__(self, *layers: nn.Module):
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to [B, C, H', W'], in channels_last memory."""
        return on_nhwc(self.forward_map, x.contiguous(memory_format=torch.channels_last))

    def forward_map(self, x: Tensor) -> Tensor:
        """Image [B, H, W, in_chans] to [B, H', W', C]."""
        for layer in self:
            x = layer(x)
        return x


class ConvNormStem(ConvNorm):
    """A convolution and its norm that make the first map of an image."""

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to [B, C, H', W'], in channels_last memory."""
        return on_nhwc(super().forward, x.contiguous(memory_format=torch.channels_last))


class PatchNormStem(nn.Module):
    """Norm, linear layer and norm of each patch's pixels, rows first and channels last.

    Args:
        in_chans: image channels.
        dim: channels C.
        patch_size: side of the patches in pixels; images are padded with zeros to whole ones.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.norm1 = LayerNorm(patch_size * patch_size * in_chans)
        self.proj = nn.Linear(patch_size * patch_size * in_chans, dim)
        self.norm2 = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to [B, C, H', W'], a view of [B, H', W', C]."""
        side = self.patch_size
        x = pad_to_multiple(x.permute(0, 2, 3, 1), (side, side))
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # [B, H', W', side, side, in_chans]
        return self.norm2(self.proj(self.norm1(x.flatten(3)))).permute(0, 3, 1, 2)


def conv_stem(
    in_chans: int,
    dims: Sequence[int],
    kernel_size: int,
    strides: Sequence[int],
    act_layer: type[nn.Module],
    *,
    last_act: bool = True,
    pool: bool = False,
) -> Stem:
    """Build a stem of batch-normalised convolutions: [B, in_chans, H, W] to [B, dims[-1], ⌈H/s⌉, ⌈W/s⌉].

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
        conv = ConvNorm(in_dim, out_dim, kernel_size, stride, kernel_size // 2, bias=False, norm_layer=nn.BatchNorm2d)
        layers += [conv, act_layer()]
    if not last_act:
        layers.pop()
    return Stem(*layers, *([OnNCHW(nn.MaxPool2d(3, 2, 1))] if pool else []))
