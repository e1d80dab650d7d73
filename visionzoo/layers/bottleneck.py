"""The blocks of residual networks, each with a convolution or a token mixer: basic and bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timm.layers import DropPath
from torch import Tensor, nn

from visionzoo.layers.arguments import Positive, Share
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import on_nchw
from visionzoo.layers.part import Part


class BasicBlock(Part):
    """Post-activation residual block on [B, H, W, C]: 3×3 convolution, then another one or a mixer (ResNet-18 and -34).

    Both are followed by a norm and the activation, the second by the activation after the sum with the shortcut. Where
    the shape changes the shortcut is a strided 1×1 convolution with norm. `branch_gate` and `peg` as in `Bottleneck`.

    Args:
        in_dim: channels in.
        out_dim: channels out.
        mixer: in place of the second convolution, on `out_dim` channels.
        stride: step of the first convolution, 1 or 2; the map shrinks by it, rounded up.
        act_layer: activation.
        norm_layer: batch norm, called with the channels.
        drop_path: probability in [0, 1) with which a sample skips the block in training.
    """

    def __init__(
        self,
        in_dim: Positive,
        out_dim: Positive,
        *,
        mixer: Mixer | None = None,
        stride: Positive = 1,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        drop_path: Share = 0.0,
    ):
        super().__init__()
        self.in_dim, self.dim = in_dim, out_dim
        conv_norm = partial(ConvNorm, bias=False, norm_layer=norm_layer)
        changes = stride > 1 or in_dim != out_dim
        self.shortcut = conv_norm(in_dim, out_dim, 1, stride) if changes else nn.Identity()
        self.conv1 = conv_norm(in_dim, out_dim, 3, stride, 1)
        self.mixer = mixer
        if mixer is None:
            self.conv2 = conv_norm(out_dim, out_dim, 3, 1, 1)
        else:
            self.norm2 = norm_layer(out_dim)
        self.branch_gate: nn.Module = nn.Identity()
        self.peg: nn.Module = nn.Identity()
        self.act = act_layer()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H', W', out_dim]."""
        self.check_inputs("B H W C", x, any_dtype=True, C=self.in_dim)
        shortcut = self.shortcut(x)
        x = self.act(self.conv1(x))
        x = self.conv2(x) if self.mixer is None else on_nchw(self.norm2, self.mixer(x))
        return self.peg(self.act(shortcut + self.drop_path(self.branch_gate(x))))


class Bottleneck(Part):
    """Post-activation residual block on [B, H, W, C]: 1×1 convolution, 3×3 convolution or mixer, 1×1 convolution.

    Each convolution and the mixer is followed by a norm, and by the activation; the activation after the last comes
    after the sum with the shortcut. Where the shape changes the shortcut is a strided 1×1 convolution with norm.

    `branch_gate` is a place for a gate of `dim` channels at the end of the branch, before the sum
    (`visionzoo.models._gating` fills it), `peg` one for a position generator at the block's end
    (`visionzoo.models._positions`).

    An `inverted` block (MobileNetV3, arXiv:1905.02244) has a depthwise convolution in the middle, no activation at its
    end, no shortcut where the shape changes, and no first convolution where `mid_dim` is `in_dim`.

    Args:
        in_dim: channels in.
        out_dim: channels out.
        mid_dim: channels between the 1×1 convolutions.
        mixer: in place of the 3×3 convolution, on `mid_dim` channels. A mixer with a stride of its own brings it; one
            without is followed by average pooling where the block has a stride.
        stride: step of the block, 1 or 2; the map shrinks by it, rounded up.
        groups: channel groups of the 3×3 convolution.
        kernel_size: side of the kernels of the convolution in the middle, odd.
        inverted: be an inverted block, whose `groups` are `mid_dim`.
        gate: called with the channels of the 3×3 convolution's output, for a gate of these channels on [B, C, H, W]
            that follows it (timm's `SqueezeExcite` or `EcaModule`).
        act_layer: activation.
        norm_layer: batch norm, called with the channels.
        drop_path: probability in [0, 1) with which a sample skips the block in training.

    Raises:
        ValueError: if the mixer's stride is neither 1 nor the block's.
    """

    def __init__(
        self,
        in_dim: Positive,
        out_dim: Positive,
        mid_dim: Positive,
        *,
        mixer: Mixer | None = None,
        stride: Positive = 1,
        groups: Positive = 1,
        kernel_size: Positive = 3,
        inverted: bool = False,
        gate: Callable[[int], nn.Module] | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        drop_path: Share = 0.0,
    ):
        super().__init__()
        self.in_dim, self.dim = in_dim, out_dim
        conv_norm = partial(ConvNorm, bias=False, norm_layer=norm_layer)
        self.shortcut: nn.Module | None = nn.Identity()
        if stride > 1 or in_dim != out_dim:
            self.shortcut = None if inverted else conv_norm(in_dim, out_dim, 1, stride)
        self.conv1 = None if inverted and mid_dim == in_dim else conv_norm(in_dim, mid_dim, 1)
        self.mixer = mixer
        if mixer is None:
            groups = mid_dim if inverted else groups
            self.conv2 = conv_norm(mid_dim, mid_dim, kernel_size, stride, kernel_size // 2, groups=groups)
            self.gate = gate(mid_dim) if gate else None
        elif mixer.stride in (1, stride):
            self.pool = nn.AvgPool2d(stride, ceil_mode=True) if mixer.stride < stride else nn.Identity()
            mid_dim = mixer.out_dim
            self.norm2 = norm_layer(mid_dim)
        else:
            raise ValueError(f"Bottleneck: the mixer's stride must be 1 or {stride=}, got {mixer.stride}")
        self.conv3 = conv_norm(mid_dim, out_dim, 1)
        self.branch_gate: nn.Module = nn.Identity()
        self.peg: nn.Module = nn.Identity()
        self.act = act_layer()
        self.last_act = nn.Identity() if inverted else act_layer()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H', W', out_dim]."""
        self.check_inputs("B H W C", x, any_dtype=True, C=self.in_dim)
        shortcut = None if self.shortcut is None else self.shortcut(x)
        if self.conv1 is not None:
            x = self.act(self.conv1(x))
        if self.mixer is None:
            x = self.act(self.conv2(x))
            if self.gate is not None:
                x = on_nchw(self.gate, x)
        else:
            x = self.act(on_nchw(self.norm2, on_nchw(self.pool, self.mixer(x))))
        x = self.drop_path(self.branch_gate(self.conv3(x)))
        return self.peg(self.last_act(x if shortcut is None else shortcut + x))
