"""The residual block that the families share: positions, token mixing, channel mixing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from timm.layers import LayerScale as TimmLayerScale
from torch import Tensor, nn

from visionzoo._torch_private import has_hooks
from visionzoo.kernels import residual_norm
from visionzoo.kernels.precision import without_autocast
from visionzoo.kernels.residual_norm.api import may_take_kernels, takes_kernels
from visionzoo.layers.nhwc import DepthwiseConvNHWC, on_nchw
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.tracing import is_traced, one_node


class Block(nn.Module):
    """Pre-norm residual block on [B, H, W, C].

    In order, each with its own residual: depthwise convolution `cpe1` (conditional position encoding, where the
    family has one), `mixer` after `norm1`, depthwise convolution `cpe2`, MLP after `norm2`.

    `peg` is a place for a position generator after all of that (`visionzoo.models._positions` fills it), and
    `branch_gate` is a place for a gate of `dim` channels at the end of the MLP's branch, before its scale and the sum
    (`visionzoo.models._gating` fills it).

    Args:
        dim: channels C.
        mixer: token mixer, [B, H, W, C] to [B, H, W, C]; None leaves its branch out. One that `sees_input` gets the
            map before `norm1` as well.
        mlp_ratio: hidden width of the MLP over `dim`.
        norm_layer: called with `dim`; `nn.Identity` where mixer and MLP normalize by themselves.
        mlp_norm_layer: as `norm_layer`, where the MLP has another norm than the mixer, also a batch norm of
            [B, C, H, W]; None for the same.
        act_layer: activation of the MLP.
        mlp_layer: called as timm's `Mlp`: (dim, hidden width, act_layer=..., drop=...).
        cpe_kernels: kernel sizes of `cpe1` and `cpe2`; None leaves one out.
        cpe_layer: their layer, called as `DepthwiseConvNHWC`: (dim, kernel size), then (map, residual=map).
        layer_scale: initial value of the learned per-channel scale of both branches, or one for the mixer's and one for
            the MLP's; None for no scale.
        drop_path: probability in [0, 1) with which a sample skips a branch in training.
        mlp_drop: dropout probability inside the MLP.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module | None,
        *,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        mlp_norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        cpe_kernels: tuple[int | None, int | None] = (None, None),
        cpe_layer: Callable[..., nn.Module] = DepthwiseConvNHWC,
        layer_scale: float | tuple[float | None, float | None] | None = None,
        drop_path: float = 0.0,
        mlp_drop: float = 0.0,
    ):
        super().__init__()
        self.dim = dim
        scales = layer_scale if isinstance(layer_scale, tuple) else (layer_scale, layer_scale)
        ls1, self.ls2 = (nn.Identity() if scale is None else LayerScale(dim, scale) for scale in scales)
        self.cpe1, self.cpe2 = (cpe_layer(dim, kernel) if kernel else None for kernel in cpe_kernels)
        self.mixer: nn.Module | None = None
        if mixer is not None:
            self.norm1 = norm_layer(dim)
            self.mixer = mixer
            self.mixer_sees_input = getattr(mixer, "sees_input", False)
            self.ls1 = ls1
        self.norm2 = (mlp_norm_layer or norm_layer)(dim)
        self.norm2_on_nchw = isinstance(self.norm2, nn.BatchNorm2d)  # or what others put in its place later
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=mlp_drop)
        self.branch_gate: nn.Module = nn.Identity()
        self.peg: nn.Module = nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        if self.cpe1 is not None:
            x = self.cpe1(x, residual=x)
        normalized = None
        if self.mixer is not None:
            x, normalized = self.join_tokens(x, self._mix(x))
        if self.cpe2 is not None:
            x = self.cpe2(x, residual=x)
        return self.mix_channels(x, normalized)

    def mix_tokens(self, x: Tensor, *beside: Tensor) -> Tensor:
        """Add the mixer's branch to [B, H, W, C]; `beside` is what the mixer takes besides the map."""
        return x if self.mixer is None else self._add(x, self._mix(x, *beside), self.ls1)

    def mix_channels(self, x: Tensor, normalized: Tensor | None = None) -> Tensor:
        """Add the MLP's branch to [B, H, W, C]; the MLP takes `norm2` of it, or `normalized` where that is known."""
        if normalized is None:
            normalized = on_nchw(self.norm2, x) if self.norm2_on_nchw else self.norm2(x)
        return self.peg(self._add(x, self.branch_gate(self.mlp(normalized)), self.ls2))

    def fusible(self) -> list[tuple[str, str]]:
        """Names of the layers that follow each other directly, for `visionzoo.fuse`."""
        return [("norm2", "mlp.fc1")] if self.norm2_on_nchw else []

    def join_tokens(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sum of [B, ..., C] and the mixer's branch, and its `norm2`: None where no launch makes both."""
        if not self._joins(x, mixed):
            return self._add(x, mixed, self.ls1), None
        norm: Any = self.norm2
        kept, scale = self._kept(mixed), getattr(self.ls1, "gamma", None)
        factor = None if kept is None else kept.flatten()
        return residual_norm(x, mixed, norm.weight, norm.bias, scale=scale, factor=factor, eps=norm.eps)

    def _mix(self, x: Tensor, *beside: Tensor) -> Tensor:
        mixer: Any = self.mixer
        y = self.norm1(x)
        return mixer(y, x) if self.mixer_sees_input else mixer(y, *beside)

    def _joins(self, x: Tensor, mixed: Tensor) -> bool:
        """Whether the sum at the end of the mixer's branch and `norm2` are one operation.

        They are where nothing lies between, no one looks at the norm or the scale by a hook, and both are our own.
        """
        norm, scale = self.norm2, self.ls1
        return (  # the quickest questions first, and the one that mostly ends it
            may_take_kernels()
            and self.cpe2 is None
            and type(norm) is LayerNorm
            and norm.bias is not None
            and len(norm.normalized_shape) == 1
            and type(scale) in (LayerScale, nn.Identity)
            and not is_traced(x)
            and x.shape == mixed.shape
            and takes_kernels(x, mixed)
            and not has_hooks(norm)
            and not has_hooks(scale)
        )

    def _kept(self, branch: Tensor) -> Tensor | None:
        """Return what stochastic depth multiplies the samples of a branch by, [B, 1, ...]; None for 1."""
        if self.training and isinstance(self.drop_path, DropPath):
            return self.drop_path(branch.new_ones((branch.shape[0],) + (1,) * (branch.ndim - 1)))  # traceable by fx
        return None

    def _add(self, x: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
        """Return x + drop_path(scale(branch)); the factors are multiplied first, so that each map is read once."""
        kept = self._kept(branch)
        if isinstance(scale, LayerScale):
            return scale(branch, residual=x, factor=kept)
        branch = scale(branch)
        return x + branch if kept is None else add_scaled(x, branch, kept)


class LayerScale(TimmLayerScale):
    """timm's `LayerScale`, which also adds: a learned factor for each channel."""

    @one_node
    def forward(self, x: Tensor, residual: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """Multiply [..., C] by the scale and by `factor`, where there is one, and add it to `residual`."""
        if residual is None:
            return super().forward(x)
        return add_scaled(residual, x, self.gamma if factor is None else self.gamma * factor)


@one_node  # it looks at the device
def add_scaled(x: Tensor, branch: Tensor, factor: Tensor) -> Tensor:
    """Return x + branch · factor in one pass; autocast would cast in passes of its own."""
    with without_autocast(x.device):
        return torch.addcmul(x, branch, factor)
