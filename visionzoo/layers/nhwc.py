"""torch's NCHW layers on [B, H, W, C] maps, without copies.

Inside stems and stages every map is [B, H, W, C] and contiguous. Its NCHW permutation is then exactly torch's
`channels_last` memory format, so torch's own convolutions, batch norms and pools run on a permuted view: the module
that owns such a layer calls it by `on_nchw`. The layer itself is torch's and sees [B, C, H, W], so that what others do
with such layers stays right: synchronizing and freezing norms, counting operations, adapters, hooks.

Layers that take [B, H, W, C] themselves are classes of their own here, and none of torch's to `isinstance`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from visionzoo.kernels import depthwise_conv, group_norm
from visionzoo.layers.arguments import Positive
from visionzoo.layers.part import Part
from visionzoo.layers.tracing import one_node


def on_nchw(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a layer that takes and gives [B, C, H, W] on a [B, H, W, C] map."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def on_nhwc(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run what takes and gives [B, H, W, C] on a [B, C, H, W] map."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OnNCHW(nn.Module):
    """A layer without parameters that takes and gives [B, C, H, W], such as a pooling, among those of [B, H, W, C]."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H', W', C']."""
        return on_nchw(self.layer, x)


class DepthwiseConvNHWC(Part):
    """Convolution of each channel of [B, H, W, C] with a kernel of its own, with zeros around the map.

    Its tensors have the names, shapes and initial values of `nn.Conv2d(dim, dim, kernel_size, groups=dim)`. torch's
    FlopCounterMode counts its products; thop and ptflops, which go by torch's own classes, count none unless
    they are given `custom_ops` or `custom_modules_hooks` with this class.

    Args:
        dim: number of kernels; channels C, but for `heads`.
        kernel_size: side of the kernels, odd.
        bias: whether it has a bias.
        heads: groups of `dim` channels, of which each is convolved with the same kernels; C is heads · dim.

    Raises:
        ValueError: if the kernel is even or not positive.
    """

    bias: nn.Parameter | None

    def __init__(self, dim: Positive, kernel_size: int, *, bias: bool = True, heads: Positive = 1):
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"DepthwiseConvNHWC: kernel_size must be odd and positive, got {kernel_size=}")
        super().__init__()
        self.dim = dim
        self.kernel_size = kernel_size
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(dim)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial values as `nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / self.kernel_size, 1 / self.kernel_size)

    @one_node  # as torch's own layers are
    def forward(self, x: Tensor, residual: Tensor | None = None, regions: tuple[int, int] | None = None) -> Tensor:
        """Convolve a [B, H, W, C] map, or each of its regions by itself, and add `residual`, as `depthwise_conv`."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.heads > 1:
            weight = weight.repeat(self.heads, 1, 1, 1)
            bias = None if bias is None else bias.repeat(self.heads)
        return depthwise_conv(x, weight, bias, residual=residual, regions=regions)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.dim}, {self.kernel_size}, bias={self.bias is not None}, heads={self.heads}"


class GroupNorm1(Part):
    """Group normalization with one group: statistics over height, width and channels of each sample.

    The same function as `nn.GroupNorm(1, dim)`, on [B, H, W, C], by `visionzoo.kernels.group_norm`. Under autocast the
    output has autocast's dtype, not float32.
    """

    def __init__(self, dim: Positive, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    @one_node  # as torch's own layers are
    def forward(self, x: Tensor) -> Tensor:
        """Normalize a [B, H, W, C] map."""
        return group_norm(x, self.weight, self.bias, eps=self.eps)
