"""Convolution with a kernel of each place's own (MHDLSA of DLGSANet, arXiv:2301.02031)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import on_nchw


class DynamicLocalMixer(Mixer):
    """A depthwise convolution whose k × k weights a small network makes at each place, for groups of channels.

        yₚ = W₁ Σₒ wₚₒ (W₀ x)ₚ₊ₒ, w from a small network at p

    Time: O(N·C·(C + k²)); memory: O(N·(C + G·k²)).

    The sum is over the offsets o of the window, with zeros around the map, and w = W₃ conv(W₂ W₀ x) is a depthwise
    convolution between two projections, without activation or normalization. Sums over the window are float32 at
    least, the rest in the dtype of the input or of autocast.

    Facts from https://github.com/NeonLeexiang/DLGSANet at 0974b9a (Apache-2.0), `IDynamicDWConvBlock`, whose `heads`
    are the channels of a group: `num_heads` here is dim over that.

    Args:
        dim: channels C.
        num_heads: groups G of channels that share weights.
        kernel_size: side k of the window, and of the convolution that makes the weights.
        reduction: C over the channels of the network between, which are one at least.
        bias: whether the layers that make the weights have biases.

    Raises:
        ValueError: if the groups do not divide the channels, the kernel is even, or a number is not positive.

    >>> import torch
    >>> DynamicLocalMixer(64, 4)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self, dim: int, num_heads: int | None = None, *, kernel_size: int = 7, reduction: int = 4, bias: bool = True
    ):
        super().__init__(dim, num_heads)
        self.check_kernels(kernel_size=kernel_size)
        if reduction < 1:
            raise ValueError(f"DynamicLocalMixer: reduction must be positive, got {reduction=}")
        hidden = max(1, dim // reduction)
        self.kernel_size = kernel_size
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.reduce = nn.Linear(dim, hidden, bias=bias)
        self.conv = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, bias=bias)
        self.to_weights = nn.Linear(hidden, self.num_heads * kernel_size**2, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        x = self.in_proj(x)
        weights = self.to_weights(on_nchw(self.conv, self.reduce(x)))
        out = convolve_by_place(x, weights.unflatten(-1, (self.num_heads, -1)), (self.kernel_size,) * 2)
        return self.proj(out)


def convolve_by_place(x: Tensor, weights: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Sum what stands in the window around each place, with zeros around the map, by weights of that place.

    Args:
        x: map [B, H, W, C].
        weights: [B, H, W, G, h·w], row by row of the window; C/G channels in turn share them.
        kernel_size: odd height h and width w of the window.

    Returns:
        [B, H, W, C] in the dtype of x; sums are float32 at least.
    """
    height, width = x.shape[1:3]
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        rows, columns = (side // 2 for side in kernel_size)
        around = F.pad(x.to(wide), (0, 0, columns, columns, rows, rows)).unflatten(-1, (weights.shape[3], -1))
        out = torch.zeros((), dtype=wide, device=x.device)
        for offset, weight in enumerate(weights.to(wide).unbind(-1)):  # all windows at once would hold h·w maps
            dy, dx = divmod(offset, kernel_size[1])
            out = out + weight[..., None] * around[:, dy : dy + height, dx : dx + width]
        return out.flatten(3).to(x.dtype)
