"""Mixing by the discrete Fourier transform alone (FNet, arXiv:2105.03824)."""

from __future__ import annotations

from torch import Tensor

from visionzoo.layers.fourier import real_transform
from visionzoo.layers.mixers.base import Mixer


class FourierMixer(Mixer):
    """The real part of the Fourier transform over tokens and channels; no parameters.

        y = Re(F_tokens · x · F_channels)

    Time: O(N·C·log(N·C)); memory: O(N·C).

    The transform is in float32 at least, whatever the dtype. It is orthonormal by default, so that the output is as
    large as the input. The paper's is not divided by √(N·C): in float16 it overflows on large maps.

    Checked against https://github.com/lxchtan/PoNet at cc9a29a (Apache-2.0), a copy of FNet in torch, whose tokens are
    one sequence; over both sides of the map is ours.

    Args:
        dim: channels C.
        num_heads: ignored.
        sequence: take the tokens as one sequence, row by row; otherwise transform over both sides of the map.
        orthonormal: divide by √(N·C).

    Raises:
        ValueError: if dim is not positive.

    >>> import torch
    >>> FourierMixer(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, num_heads: int | None = None, *, sequence: bool = False, orthonormal: bool = True):
        super().__init__(dim, num_heads)
        self.sequence, self.orthonormal = sequence, orthonormal

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        tokens = x.flatten(1, 2).unsqueeze(1) if self.sequence else x
        return real_transform(tokens, orthonormal=self.orthonormal).to(x.dtype).reshape(x.shape)
