"""Gates that timm has, on [B, H, W, C]: squeeze-and-excitation and its kin, coordinate attention, strips.

timm.layers at 1.0.31, Apache-2.0. Options and their defaults are those of the papers where timm's differ.
"""

from __future__ import annotations

from typing import Any

from timm.layers import EcaModule, create_attn
from torch import Tensor

from visionzoo.layers.gates.base import Gate
from visionzoo.layers.nhwc import on_nchw


class TimmGate(Gate):
    """One of timm's attention modules of [B, C, H, W] maps, on [B, H, W, C] without copies.

    Args:
        dim: channels C.
        kind: timm's name of the module (`timm.layers.create_attn`).
        options: its arguments.
    """

    def __init__(self, dim: int, kind: str, **options: Any):
        super().__init__(dim)
        self.layer = create_attn(kind, dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        if x.shape[0] == 0:  # some of timm's modules infer a size from the number of elements
            return x.clone()
        return on_nchw(self.layer, x)


class EcaGate(TimmGate):
    """Efficient channel attention (ECA, Wang et al., arXiv:1910.03151): O(N·C), dtype of the input or of autocast.

    The mean of the map passes a convolution along the channels, without bias, and a sigmoid that scales the channels.
    The same as models/eca_module.py of https://github.com/BangguWu/ECANet at b332f6b (MIT license).

    Args:
        dim: channels C.
        kernel_size: of the convolution, odd; None for the paper's, the odd number near (log₂ C + `beta`) / `gamma`, at
            least 3. The authors' ResNet-50 has 3, 5, 5, 7 in its stages.
        gamma: see `kernel_size`.
        beta: see `kernel_size`.

    Raises:
        ValueError: if the kernel is even or `gamma` is not positive.

    >>> import torch
    >>> EcaGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, kernel_size: int | None = None, gamma: float = 2.0, beta: float = 1.0):
        self.check_positive(gamma=gamma)
        super().__init__(dim, "eca", gamma=gamma, beta=beta)
        self.check_kernels(kernel_size=kernel_size)
        if kernel_size is not None:  # timm overrides it where it knows the channels
            self.layer = EcaModule(kernel_size=kernel_size)


class CircularEcaGate(TimmGate):
    """`EcaGate` whose convolution goes round in a circle, from the last channel to the first; timm's.

    O(N·C), dtype of the input or of autocast. The convolution's width must not be above C.

    Args:
        dim: channels C.
        gamma: as in `EcaGate`.
        beta: as in `EcaGate`.

    Raises:
        ValueError: if `gamma` is not positive, or the channels are fewer than the convolution's width.

    >>> import torch
    >>> CircularEcaGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, gamma: float = 2.0, beta: float = 1.0):
        self.check_positive(gamma=gamma)
        super().__init__(dim, "ceca", gamma=gamma, beta=beta)
        (kernel,) = self.layer.conv.kernel_size
        if kernel > dim:
            raise ValueError(
                f"CircularEcaGate: {dim=} channels are fewer than the kernel's {kernel}; pass a larger gamma"
            )


class SqueezeExciteGate(TimmGate):
    """Squeeze-and-excitation (Hu et al., arXiv:1709.01507): scale the channels by an MLP of their means; O(N·C).

    Everything has the dtype of the input or of autocast.

    Args:
        dim: channels C.
        reduction: C over the MLP's hidden width, which is rounded down.
        max_pool: take the mean of mean and maximum in place of the mean.
        bias: whether the MLP has biases.

    Raises:
        ValueError: if nothing remains of the channels.

    >>> import torch
    >>> SqueezeExciteGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, reduction: float = 16, max_pool: bool = False, bias: bool = True):
        super().__init__(dim, "se", rd_channels=self.reduced(reduction, dim), add_maxpool=max_pool, bias=bias)


class EffectiveSqueezeExciteGate(TimmGate):
    """Effective squeeze-and-excitation (CenterMask, arXiv:1911.06667): one linear layer, hard sigmoid; O(N·C + C²).

    Everything has the dtype of the input or of autocast.

    Args:
        dim: channels C.
        max_pool: take the mean of mean and maximum in place of the mean.

    Raises:
        ValueError: if there are no channels.

    >>> import torch
    >>> EffectiveSqueezeExciteGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, max_pool: bool = False):
        super().__init__(dim, "ese", add_maxpool=max_pool)


class GatherExciteGate(TimmGate):
    """Gather-excite without parameters (GE-θ⁻, Hu et al., arXiv:1810.12348): the sigmoid of a neighborhood's mean.

    O(N·C·extent²) at most, dtype of the input or of autocast. Of timm's module this is what runs in 1.0.31; the forms
    with parameters and with an MLP raise TypeError there.

    Args:
        dim: channels C; only checked.
        extent: every extent-th position gathers 2·extent − 1 rows and columns, even; 0 for the whole map.
        max_pool: take the mean of mean and maximum in place of the mean.

    Raises:
        ValueError: if the extent is odd or negative.

    >>> import torch
    >>> GatherExciteGate(64, extent=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, extent: int = 0, max_pool: bool = False):
        if extent < 0 or extent % 2:
            raise ValueError(f"GatherExciteGate: extent must be even, 0 for the whole map, got {extent=}")
        super().__init__(dim, "ge", extent=extent, add_maxpool=max_pool, use_mlp=False)


class GlobalContextGate(TimmGate):
    """Global context (GCNet, Cao et al., arXiv:1904.11492): an MLP of what attention gathers, for all; O(N·C).

    Everything has the dtype of the input or of autocast.

    Args:
        dim: channels C.
        reduction: C over the MLP's hidden width, which is rounded down.
        attention: gather by a softmax over the positions; else by the mean.
        fusion: "add" the MLP's output, "mul" by its sigmoid, or "both" ("mul" first, each with its own MLP).

    Raises:
        ValueError: if nothing remains of the channels, or the fusion is unknown.

    >>> import torch
    >>> GlobalContextGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, reduction: float = 16, attention: bool = True, fusion: str = "add"):
        if fusion not in ("add", "mul", "both"):
            raise ValueError(f"GlobalContextGate: fusion must be 'add', 'mul' or 'both', got {fusion=}")
        super().__init__(
            dim,
            "gc",
            use_attn=attention,
            fuse_add=fusion != "mul",
            fuse_scale=fusion != "add",
            rd_channels=self.reduced(reduction, dim),
        )


class CoordinateGate(TimmGate):
    """Coordinate attention (Hou et al., arXiv:2103.02907): gates of rows and columns from a shared bottleneck; O(N·C).

    With the defaults the same as coordatt.py of https://github.com/houqb/CoordAttention at 7619bea (MIT license).
    Everything has the dtype of the input or of autocast.

    Args:
        dim: channels C.
        reduction: C over the width of the bottleneck, which is rounded down and at least 8.
        bias: whether the linear layers have biases.
        residual: add the input.

    Raises:
        ValueError: if the reduction is not positive.

    >>> import torch
    >>> CoordinateGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, reduction: float = 32, bias: bool = True, residual: bool = False):
        self.check_positive(reduction=reduction)
        width = max(8, int(dim // reduction))
        super().__init__(dim, "coord", rd_channels=width, bias=bias, has_skip=residual)


class SimpleCoordinateGate(TimmGate):
    """timm's simplified coordinate attention: linear layers, no norm, rows and columns added, then a sigmoid; O(N·C).

    Everything has the dtype of the input or of autocast.

    Args:
        dim: channels C.
        reduction: C over the width of the bottleneck, which is rounded down.
        bias: whether the linear layers have biases.
        residual: add the input.

    Raises:
        ValueError: if nothing remains of the channels.

    >>> import torch
    >>> SimpleCoordinateGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, reduction: float = 6, bias: bool = True, residual: bool = False):
        super().__init__(dim, "scoord", rd_channels=self.reduced(reduction, dim), bias=bias, has_skip=residual)


class StripGate(TimmGate):
    """timm's strip attention: the sigmoid of row means plus column means, each after a convolution; O(N·C).

    Everything has the dtype of the input or of autocast.

    Args:
        dim: channels C.
        kernel_size: of the depthwise convolutions along rows and columns, odd; None for none.
        bias: whether they have biases.
        residual: add the input.

    Raises:
        ValueError: if the kernel is even.

    >>> import torch
    >>> StripGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, kernel_size: int | None = 3, bias: bool = False, residual: bool = False):
        super().__init__(
            dim, "strip", use_conv=kernel_size is not None, kernel_size=kernel_size or 1, bias=bias, has_skip=residual
        )
        self.check_kernels(kernel_size=kernel_size)
