"""Spectral gating: a learned filter over the map's frequencies (GFNet, arXiv:2107.00645; SpectFormer)."""

from __future__ import annotations

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.layers.fourier import irfft2, rfft2
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.position import resize_table


class SpectralGateMixer(Mixer):
    """Each channel is multiplied, at each frequency, by a learned complex number: a circular convolution of map size.

        y = F⁻¹(W ⊙ F x)

    Time: O(N·C·log N); memory: O(N·C).

    The transforms are in float32 at least, whatever the dtype. The filter is made for maps of one size;
    for others it is interpolated (bicubic, with the lowest and the highest frequencies staying what they are).

    Facts from https://github.com/badripatro/SpectFormers at b6cf487 (no licence).

    Args:
        dim: channels C.
        num_heads: ignored.
        map_size: side of the maps that the filter is made for, in tokens, or (height, width).
        always_float32: transform maps of float64 in float32, too, as SpectFormer's code does.

    Raises:
        ValueError: if the size is not positive.

    >>> import torch
    >>> SpectralGateMixer(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        map_size: int | tuple[int, int] = 14,
        always_float32: bool = False,
    ):
        super().__init__(dim, num_heads)
        height, width = to_2tuple(map_size)
        if height < 1 or width < 1:
            raise ValueError(f"SpectralGateMixer: map_size must be positive, got {map_size=}")
        self.always_float32 = always_float32
        self.complex_weight = nn.Parameter(0.02 * torch.randn(height, width // 2 + 1, dim, 2))  # real, imaginary

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        spectrum = rfft2(x.float() if self.always_float32 else x)
        weight = self.complex_weight.to(torch.promote_types(x.dtype, torch.float32))
        weight = _resize(weight, spectrum.shape[1:3])
        return irfft2(spectrum * torch.view_as_complex(weight.contiguous()), x.shape[2]).to(x.dtype)

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's filter [h, w, C, 2], of maps of another size, to the size of ours."""
        return _resize(weight, self.complex_weight.shape[:2])


def _resize(weight: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Interpolate a filter [h, w, C, 2] to [H, W, C, 2] with (H, W) = `size`; the same filter if it fits."""
    return resize_table(weight.flatten(2).unsqueeze(0), size, "bicubic", align_corners=True)[0].unflatten(2, (-1, 2))
