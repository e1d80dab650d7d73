"""A convolution or linear layer and its normalization: the pairs that stems, downsampling and norm-free blocks have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import make_divisible, to_2tuple
from torch import Tensor, nn

from visionzoo.kernels.regions import is_symbolic
from visionzoo.layers.arguments import Natural, Positive, Share
from visionzoo.layers.nhwc import DepthwiseConvNHWC, on_nchw
from visionzoo.layers.padding import pad_to_multiple
from visionzoo.layers.part import Part
from visionzoo.layers.tracing import one_node


class ConvNorm(Part):
    """Convolution and normalization on [B, H, W, C] maps, in either order.

    Args:
        in_dim: channels in.
        out_dim: channels out.
        kernel_size: side of the square kernel.
        stride: step of the kernel; the map shrinks by it.
        padding: zeros on every side before the convolution.
        groups: channel groups of the convolution.
        bias: whether the convolution has a bias.
        norm_layer: called with the channels it normalizes, for a norm of [B, H, W, C] or a batch norm of [B, C, H, W];
            None for no normalization.
        norm_first: normalize the input (`in_dim` channels) instead of the output.
        norm_weight: initial value of the norm's weight; 0 lets a residual branch start as nothing.
        pad_to_stride: add zeros at the bottom and right of the convolution's input until the stride divides it, so
            that no row or column is lost (sizes are rounded up); else the remainder is dropped, as torch does.

    Raises:
        ValueError: in `forward`, if the map is smaller than the kernel.
    """

    def __init__(
        self,
        in_dim: Positive,
        out_dim: Positive,
        kernel_size: Positive,
        stride: Positive = 1,
        padding: Natural = 0,
        *,
        groups: Positive = 1,
        bias: bool = True,
        norm_layer: Callable[[int], nn.Module] | None = None,
        norm_first: bool = False,
        norm_weight: float = 1.0,
        pad_to_stride: bool = False,
    ):
        super().__init__()
        self.in_dim, self.kernel_size, self.padding = in_dim, kernel_size, padding
        self.norm_first = norm_first
        self.pad_to_stride = to_2tuple(stride) if pad_to_stride else None
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding, groups=groups, bias=bias)
        self.norm = norm_layer(in_dim if norm_first else out_dim) if norm_layer else nn.Identity()
        self.norm_on_nchw = isinstance(self.norm, nn.BatchNorm2d)  # or what others put in its place later
        if norm_weight != 1.0:
            nn.init.constant_(self.norm.get_parameter("weight"), norm_weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H', W', out_dim]."""
        self.check_inputs("B H W C", x, any_dtype=True, C=self.in_dim)
        if self.norm_first:
            x = self._normalize(x)
        if self.pad_to_stride:
            x = pad_to_multiple(x, self.pad_to_stride)
        x = on_nchw(self.conv, _check_size(x, self.kernel_size, self.padding))
        return x if self.norm_first else self._normalize(x)

    def _normalize(self, x: Tensor) -> Tensor:
        return on_nchw(self.norm, x) if self.norm_on_nchw else self.norm(x)

    def fusible(self) -> list[tuple[str, str]]:
        """Names of the layers that follow each other directly, for `visionzoo.fuse`."""
        if not self.norm_first:
            return [("conv", "norm")]
        return [] if self.pad_to_stride else [("norm", "conv")]


@one_node
def _check_size(x: Tensor, kernel_size: int, padding: int) -> Tensor:
    # Under torch.compile a test on symbolic sizes would cost a recompilation; torch's own message must do there.
    if not torch.compiler.is_compiling() and not is_symbolic(x) and min(x.shape[1:3]) + 2 * padding < kernel_size:
        raise ValueError(
            f"the image is too small for this model: a convolution with a kernel of {kernel_size} x {kernel_size} "
            f"needs a map of at least {max(1, kernel_size - 2 * padding)} x {max(1, kernel_size - 2 * padding)}, and "
            f"got one of {x.shape[1]} x {x.shape[2]}"
        )
    return x


class DepthwiseConvNorm(Part):
    """Depthwise convolution without bias and batch normalization, on [B, H, W, C] maps, which keep their size.

    Args:
        dim: channels C.
        kernel_size: side of the kernels, odd.
        norm_weight: initial value of the norm's weight; 0 lets a residual branch start as nothing.
    """

    def __init__(self, dim: Positive, kernel_size: Positive, *, norm_weight: float = 1.0):
        super().__init__()
        self.conv = DepthwiseConvNHWC(dim, kernel_size, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        nn.init.constant_(self.norm.weight, norm_weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; adds `residual`."""
        if isinstance(self.norm, nn.Identity):  # folded into the convolution, which can then add the residual
            return self.conv(x, residual=residual)
        x = on_nchw(self.norm, self.conv(x))
        return x if residual is None else residual + x

    def fusible(self) -> list[tuple[str, str]]:
        """Names of the layers that follow each other directly, for `visionzoo.fuse`."""
        return [("conv", "norm")]


class BranchedDepthwiseConv(Part):
    """Sum of two depthwise convolutions, a large and a small one, each with batch norm; one convolution when fused.

    From RepVGG (arXiv:2101.03697), on [B, H, W, C] maps.

    Args:
        in_dim: channels in.
        out_dim: channels out, a multiple of `in_dim`; each channel is seen by out_dim / in_dim kernels.
        kernel_size: side of the large kernels, odd.
        stride: step of the kernels; the map shrinks by it, rounded up.
        small_kernel: side of the small kernels, odd and not above `kernel_size`.

    Raises:
        ValueError: if `in_dim` does not divide `out_dim`.
    """

    def __init__(
        self,
        in_dim: Positive,
        out_dim: Positive,
        kernel_size: Positive,
        stride: Positive = 1,
        *,
        small_kernel: Positive = 3,
    ):
        super().__init__()
        if out_dim % in_dim:
            raise ValueError(f"BranchedDepthwiseConv: out_dim must be a multiple of in_dim, got {out_dim=}, {in_dim=}")
        self.small: nn.Module | None
        self.large, self.small = (
            DepthwiseConvNorm(in_dim, kernel)
            if in_dim == out_dim and stride == 1
            else ConvNorm(
                in_dim, out_dim, kernel, stride, kernel // 2, groups=in_dim, bias=False, norm_layer=nn.BatchNorm2d
            )
            for kernel in (kernel_size, small_kernel)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H', W', out_dim]."""
        out = self.large(x)
        return out if self.small is None else out + self.small(x)

    def merge_branches(self) -> None:
        """Add the small kernels to the large ones, once their norms are folded (`visionzoo.fuse`)."""
        if self.small is None:
            return
        large: Any = self.large.conv
        small: Any = self.small.conv
        margin = (large.weight.shape[-1] - small.weight.shape[-1]) // 2
        large.weight += F.pad(small.weight, [margin] * 4)
        large.bias += small.bias
        self.small = None


class ResidualConvNorm(Part):
    """A map plus its 1×1 convolution after batch norm; one convolution when fused. On [B, H, W, C] maps.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: Positive):
        super().__init__()
        self.conv = ConvNorm(dim, dim, 1, bias=False, norm_layer=nn.BatchNorm2d, norm_first=True)
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        return self.conv(x) if self.merged else x + self.conv(x)

    def merge_branches(self) -> None:
        """Add the identity to the convolution, once its norm is folded (`visionzoo.fuse`)."""
        if not self.merged:
            self.conv.conv.weight += torch.eye(self.conv.conv.out_channels).to(self.conv.conv.weight)[..., None, None]
        self.merged = True


class LinearNorm(Part):
    """Linear layer without bias and batch normalization over all tokens of the batch, on [B, H, W, C] maps.

    Args:
        in_dim: channels in.
        out_dim: channels out.
        norm_weight: initial value of the norm's weight; 0 lets a residual branch start as nothing.
    """

    def __init__(self, in_dim: Positive, out_dim: Positive, *, norm_weight: float = 1.0):
        super().__init__()
        self.in_dim = in_dim
        self.linear = nn.Linear(in_dim, out_dim, bias=False)
        self.norm = nn.BatchNorm2d(out_dim)
        nn.init.constant_(self.norm.weight, norm_weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H, W, out_dim]."""
        self.check_inputs("B H W C", x, C=self.in_dim)
        return on_nchw(self.norm, self.linear(x))

    def fusible(self) -> list[tuple[str, str]]:
        """Names of the layers that follow each other directly, for `visionzoo.fuse`."""
        return [("linear", "norm")]


class LinearNormMlp(Part):
    """MLP of two `LinearNorm`, the second starting at 0; in place of timm's `Mlp` where a block has no other norms.

    Args:
        dim: channels C.
        hidden_dim: channels between the layers.
        act_layer: activation between the layers.
        drop: dropout probability after the activation.
    """

    def __init__(self, dim: Positive, hidden_dim: Positive, *, act_layer: type[nn.Module] = nn.GELU, drop: Share = 0.0):
        super().__init__()
        self.fc1 = LinearNorm(dim, hidden_dim)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = LinearNorm(hidden_dim, dim, norm_weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        return self.fc2(self.drop(self.act(self.fc1(x))))


class InvertedResidual(Part):
    """1×1, depthwise 3×3 and 1×1 convolution, each with batch norm, on [B, H, W, C] (MobileNetV2, arXiv:1801.04381).

    Args:
        in_dim: channels in.
        out_dim: channels out.
        ratio: channels between over `in_dim`, which are brought to a multiple of 8.
        act_layer: activation after the first two.
        stride: of the depthwise convolution, 1 or 2; the map shrinks by it, rounded up.
    """

    def __init__(
        self, in_dim: Positive, out_dim: Positive, *, ratio: float, act_layer: type[nn.Module], stride: Positive = 1
    ):
        super().__init__()
        conv = partial(ConvNorm, bias=False, norm_layer=nn.BatchNorm2d)
        hidden = make_divisible(round(in_dim * ratio), 8)
        self.expand = conv(in_dim, hidden, 1)
        self.depthwise = (
            DepthwiseConvNorm(hidden, 3) if stride == 1 else conv(hidden, hidden, 3, stride, 1, groups=hidden)
        )
        self.reduce = conv(hidden, out_dim, 1)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H', W', out_dim]."""
        return self.reduce(self.act(self.depthwise(self.act(self.expand(x)))))
