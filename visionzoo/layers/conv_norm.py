"""A convolution and its normalisation: the pair that stems and downsampling are made of."""

from __future__ import annotations

from collections.abc import Callable

from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.layers.nhwc import ConvNHWC
from visionzoo.layers.padding import pad_to_multiple


class ConvNorm(nn.Module):
    """Convolution and normalisation on [B, H, W, C] maps, in either order.

    Args:
        in_dim: channels in.
        out_dim: channels out.
        kernel_size: side of the square kernel.
        stride: step of the kernel; the map shrinks by it.
        padding: zeros on every side before the convolution.
        groups: channel groups of the convolution.
        bias: whether the convolution has a bias.
        norm_layer: called with the channels it normalises; None for no normalisation.
        norm_first: normalise the input (`in_dim` channels) instead of the output.
        pad_to_stride: add zeros at the bottom and right of the convolution's input until the stride divides it, so
            that no row or column is lost (sizes are rounded up); else the remainder is dropped, as torch does.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        groups: int = 1,
        bias: bool = True,
        norm_layer: Callable[[int], nn.Module] | None = None,
        norm_first: bool = False,
        pad_to_stride: bool = False,
    ):
        super().__init__()
        self.norm_first = norm_first
        self.pad_to_stride = to_2tuple(stride) if pad_to_stride else None
        self.conv = ConvNHWC(in_dim, out_dim, kernel_size, stride, padding, groups=groups, bias=bias)
        self.norm = norm_layer(in_dim if norm_first else out_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H', W', out_dim]."""
        if self.norm_first:
            x = self.norm(x)
        if self.pad_to_stride:
            x = pad_to_multiple(x, self.pad_to_stride)
        x = self.conv(x)
        return x if self.norm_first else self.norm(x)
