"""The real Fourier transform of maps and its inverse, in float32 at least, the same on every device.

torch has none in bfloat16, and float16 on a GPU only for sizes that are powers of two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rfft2(x: Tensor) -> Tensor:
    """Transform a map [B, H, W, C] over H and W, orthonormally, to its half spectrum [B, H, ⌊W/2⌋ + 1, C].

    It is complex64, or complex128 of float64.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.fft.rfft2(_at_least_one(x), dim=(1, 2), norm="ortho")[: x.shape[0]]


def irfft2(spectrum: Tensor, width: int) -> Tensor:
    """Transform a half spectrum [B, H, ⌊W/2⌋ + 1, C] back to a map [B, H, W, C] with W = `width`, real.

    The spectrum may be none of a real map, as after an elementwise product: it is inverted over H, then over W, where
    columns 0 and W/2 stand for real numbers and their imaginary part is dropped. numpy and torch on a CPU do so;
    on a GPU torch's own `irfft2` does something else, and its `irfft` does not always drop it
    (https://github.com/pytorch/pytorch/issues/154496).
    """
    spectra = torch.fft.ifft(_at_least_one(spectrum), dim=1, norm="ortho")
    column = torch.arange(spectra.shape[2], device=spectra.device).unsqueeze(-1)  # over channels
    is_real = (column == 0) | (2 * column == width)
    imaginary = torch.where(is_real, torch.zeros_like(spectra.imag), spectra.imag)
    maps = torch.fft.irfft(torch.complex(spectra.real, imaginary), n=width, dim=2, norm="ortho")
    return maps[: spectrum.shape[0]].contiguous()


def real_transform(x: Tensor, *, orthonormal: bool = True) -> Tensor:
    """Return the real part of the transform of a map [B, H, W, C] over H, W and C, in float32 at least.

    Args:
        x: map.
        orthonormal: divide by √(H·W·C).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = "ortho" if orthonormal else "backward"
    spectrum = torch.fft.fft(_at_least_one(x), dim=3, norm=norm)
    for dim in (2, 1):
        spectrum = torch.fft.fft(spectrum, dim=dim, norm=norm)
    return spectrum.real[: x.shape[0]].contiguous()


def _at_least_one(x: Tensor) -> Tensor:
    """Add a sample of zeros where there is none, which torch's transforms refuse on a CPU."""
    if torch.compiler.is_compiling() or x.shape[0]:
        return x
    return F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1))
