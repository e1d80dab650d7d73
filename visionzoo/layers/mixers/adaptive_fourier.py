"""Adaptive frequency filters (AFFNet, arXiv:2307.14008; AFNO, arXiv:2111.13587)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.fourier import irfft2, rfft2
from visionzoo.layers.mixers.base import Mixer

BLOCKS = 8  # of the channels where the caller does not say how many


class AdaptiveFourierMixer(Mixer):
    """The map's spectrum is multiplied by a filter that an MLP over the channels makes of it; the map is added.

        y = x + F⁻¹(shrink(MLP(F x)) ⊙ F x)

    Time: O(N·C·log N + N·C²/b) with b blocks; memory: O(N·C).

    The MLP is one of complex numbers, block-diagonal over the channels and the same at every frequency: a circular
    convolution with a kernel of map size that depends on the map. Real and imaginary parts of the filter that are
    smaller than a threshold are zero, and the others nearer to zero by it.

    Transforms and MLP are in float32 at least, also under autocast.

    Facts from https://github.com/microsoft/TokenMixers at 99dbe38 (MIT).

    Args:
        dim: channels C.
        num_heads: ignored.
        num_blocks: blocks b of the channels; None means 8 or the next smaller number that divides `dim`.
        threshold: of the filter, not negative.
        act_layer: activation of the MLP, of the real and the imaginary part by itself.

    Raises:
        ValueError: if the blocks do not divide the channels, or the threshold is negative.

    >>> import torch
    >>> AdaptiveFourierMixer(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        num_blocks: int | None = None,
        threshold: float = 0.01,
        act_layer: type[nn.Module] = nn.SiLU,
    ):
        super().__init__(dim, num_heads)
        if num_blocks is None:
            num_blocks = next(blocks for blocks in range(BLOCKS, 0, -1) if dim % blocks == 0)
        if num_blocks < 1 or dim % num_blocks:
            raise ValueError(f"AdaptiveFourierMixer: num_blocks must divide dim, got {dim=} and {num_blocks=}")
        if threshold < 0:
            raise ValueError(f"AdaptiveFourierMixer: threshold must not be negative, got {threshold=}")
        self.num_blocks, self.threshold = num_blocks, threshold
        width = dim // num_blocks
        self.w1, self.w2 = (nn.Parameter(0.02 * torch.randn(2, num_blocks, width, width)) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(0.02 * torch.randn(2, num_blocks, width)) for _ in range(2))
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        with without_autocast(x.device):
            spectrum = rfft2(x)
            blocks = spectrum.unflatten(-1, (self.num_blocks, -1))
            parts = torch.cat([blocks.real, blocks.imag], -1)  # [B, H, W', b, 2·C/b]
            parts = _complex_linear(self.act(_complex_linear(parts, self.w1, self.b1)), self.w2, self.b2)
            real, imaginary = F.softshrink(parts, self.threshold).chunk(2, -1)
            filtered = spectrum * torch.complex(real, imaginary).flatten(-2)
            return x + irfft2(filtered, x.shape[2]).to(x.dtype)


def _complex_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply real parts beside imaginary ones [..., b, 2·n] by complex matrices [2, b, n, m]: [..., b, 2·m]."""
    real, imaginary = weight.to(x.dtype).unbind()
    matrix = torch.cat([torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)], -2)
    return torch.einsum("...bn,bnm->...bm", x, matrix) + torch.cat(bias.to(x.dtype).unbind(), -1)
