"""The bottleneck block of residual networks, with a convolution or a token mixer in the middle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timm.layers import DropPath
from torch import Tensor, nn

from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import on_nchw


class Bottleneck(nn.Module):
    """Post-activation residual block on [B, H, W, C]: 1×1 convolution, 3×3 convolution or mixer, 1×1 convolution.

    Each convolution and the mixer is followed by a norm, and by the activation; the activation after the last comes
    after the sum with the shortcut. Where the shape changes the shortcut is a strided 1×1 convolution with norm.

    `branch_gate` is a place for a gate of `dim` channels at the end of the branch, before the sum
    (`visionzoo.models._gating` fills it), `peg` one for a position generator at the block's end
    (`visionzoo.models._positions`).

    Args:
        in_dim: channels in.
        out_dim: channels out.
        mid_dim: channels between the 1×1 convolutions.
        mixer: in place of the 3×3 convolution, on `mid_dim` channels. A mixer with a stride of its own brings it; one
            without is followed by average pooling where the block has a stride.
        stride: step of the block, 1 or 2; the map shrinks by it, rounded up.
        groups: channel groups of the 3×3 convolution.
        gate: called with the channels of the 3×3 convolution's output, for a gate of these channels on [B, C, H, W]
            that follows it (timm's `SqueezeExcite` or `EcaModule`).
        act_layer: activation.
        drop_path: probability in [0, 1) with which a sample skips the block in training.

    Raises:
        ValueError: if the mixer's stride is neither 1 nor the block's.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        mid_dim: int,
        *,
        mixer: Mixer | None = None,
        stride: int = 1,
        groups: int = 1,
        gate: Callable[[int], nn.Module] | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.dim = out_dim
        conv_norm = partial(ConvNorm, bias=False, norm_layer=nn.BatchNorm2d)
        self.shortcut = conv_norm(in_dim, out_dim, 1, stride) if stride > 1 or in_dim != out_dim else nn.Identity()
        self.conv1 = conv_norm(in_dim, mid_dim, 1)
        self.mixer = mixer
        if mixer is None:
            self.conv2 = conv_norm(mid_dim, mid_dim, 3, stride, 1, groups=groups)
            self.gate = gate(mid_dim) if gate else None
        elif mixer.stride in (1, stride):
            self.pool = nn.AvgPool2d(stride, ceil_mode=True) if mixer.stride < stride else nn.Identity()
            mid_dim = mixer.out_dim
            self.norm2 = nn.BatchNorm2d(mid_dim)
        else:
            raise ValueError(f"Bottleneck: the mixer's stride must be 1 or {stride=}, got {mixer.stride}")
        self.conv3 = conv_norm(mid_dim, out_dim, 1)
        self.branch_gate: nn.Module = nn.Identity()
        self.peg: nn.Module = nn.Identity()
        self.act = act_layer()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H', W', out_dim]."""
        shortcut = self.shortcut(x)
        x = self.act(self.conv1(x))
        if self.mixer is None:
            x = self.act(self.conv2(x))
            if self.gate is not None:
                x = on_nchw(self.gate, x)
        else:
            x = self.act(on_nchw(self.norm2, on_nchw(self.pool, self.mixer(x))))
        return self.peg(self.act(shortcut + self.drop_path(self.branch_gate(self.conv3(x)))))
