"""Global convolution whose kernel is made from its input (Orchid, arXiv:2402.18508)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.fourier import irfft2, rfft2
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.position import resize_table


class ImplicitFilter(nn.Module):
    """A kernel as long as the sequence, which a small network with sines makes from places (Hyena, arXiv:2302.10866).

    Later values are damped, from channel to channel more: by exp(-d·t) with t from 0 to 1 along the sequence.

    Args:
        dim: channels C.
        map_size: height and width of the map whose places, row by row, it knows; interpolated to others.
        hidden_dim: width of the network.
        position_dim: numbers for each place, odd, at least 3: t, and cosines and sines; they are learned from there.
        depth: hidden layers after the first.
        frequency: that of the sines at the start.
    """

    NO_WEIGHT_DECAY = ("positions", "frequency")

    def __init__(
        self,
        dim: int,
        map_size: tuple[int, int],
        *,
        hidden_dim: int = 64,
        position_dim: int = 33,
        depth: int = 1,
        frequency: float = 10.0,
    ):
        super().__init__()
        self.map_size = map_size
        count, bands = map_size[0] * map_size[1], (position_dim - 1) // 2
        angles = 2 * math.pi / count * torch.arange(count)[:, None] * torch.linspace(1e-4, bands - 1, bands)
        places = torch.cat([torch.linspace(0, 1, count)[:, None], angles.cos(), -angles.sin()], 1)
        self.positions = nn.Parameter(places.unsqueeze(0))
        self.frequency = nn.Parameter(torch.full((1, hidden_dim), float(frequency)))
        self.layers = nn.ModuleList(nn.Linear(width, hidden_dim) for width in (position_dim, *[hidden_dim] * depth))
        self.last = nn.Linear(hidden_dim, dim, bias=False)
        self.bias = nn.Parameter(torch.randn(dim))

    def forward(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Kernel [1, 1, N, C] of a map of (H, W) = `size` and the factor of the token itself [C]; float32 at least."""
        wide = torch.promote_types(self.positions.dtype, torch.float32)
        x = self.fitted(self.positions, self.map_size, size).clone()  # no view of a parameter enters a layer
        for layer in self.layers:
            x = torch.sin(self.frequency * layer(x))
        x = self.last(x).to(wide)
        index = torch.arange(size[0] * size[1], device=x.device, dtype=wide)[:, None]
        t = index / index[-1:].clamp(min=1)  # exporters hold linspace to one number of steps
        slow, fast = -math.log(0.01) / 1.5, -math.log(0.01) / 0.3
        decay = torch.linspace(slow, fast, x.shape[-1], device=x.device, dtype=wide)
        return (x * torch.exp(-t * decay)).unsqueeze(0), self.bias.to(wide, copy=True)  # may be offloaded

    @staticmethod
    def fitted(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        """Interpolate places [1, h·w, C] of a map to those of another."""
        return resize_table(table.unflatten(1, old), new, "bicubic").flatten(1, 2)

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's places, [1, N, C] of a square map of another size, to ours."""
        side = math.isqrt(weight.shape[1])
        if name != "positions" or side * side != weight.shape[1]:
            raise ValueError(f"{name}: expected the places of a square map [1, N, C], got {tuple(weight.shape)}")
        return self.fitted(weight, (side, side), self.map_size)


class ConvAlong(nn.Module):
    """A convolution of each channel along the sequence, and a norm of what comes out.

    Args:
        dim: channels in C.
        kernel_size: odd.
        outputs: channels out of each.
    """

    def __init__(self, dim: int, kernel_size: int, outputs: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(dim, outputs * dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(outputs * dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, N, C] to [B, 1, N, outputs·C], in the dtype of x."""
        dtype, x = x.dtype, x.to(self.conv.weight.dtype)
        return self.norm(self.conv(x.squeeze(1).mT).mT).unsqueeze(1).to(dtype)


class DataDependentConvMixer(Mixer):
    """Tokens in a row, gated, convolved with a kernel of their length that is made from them, and gated again.

        y = g₂ ⊙ (h(x) ∗ (g₁ ⊙ x)), ∗ around the whole sequence

    Time: O(N·C·log N), with transform="dct" O(N²·C); memory: O(N·C), with "dct" O(N²).

    The kernel is a learned one and one that a small network conditions on the input; both are around the whole sequence
    (circular). Transforms and products are in float32 at least.

    Facts from https://github.com/Karami-m/orchid at 061f6df (MIT).

    Args:
        dim: channels C.
        num_heads: ignored.
        map_size: side of the maps whose places the learned kernel knows, in tokens, or (height, width).
        conditioning: "magnitude", from the squared spectrum (DCT: its absolute values) between convolutions along the
            sequence and along the frequencies, which ignores shifts (type I), or "correlation" of two maps of the
            input (type II).
        transform: "fft" (products over N, as released), "fft_ortho" (over √N) or "dct", orthonormal, whose products
            are no circular convolution but a symmetric one.
        short_kernel: taps of the causal convolution of the three projections.
        conditioning_kernel: taps of the convolutions that condition, odd.
        filter_dim: width of the network of the learned kernel.
        position_dim: numbers for each place that it sees, odd and at least 3.
        filter_depth: its hidden layers after the first.
        frequency: of its sines at the start.
        residual: add the input, convolved with another learned kernel.

    Raises:
        ValueError: if a name is unknown, or a size out of its range.

    >>> import torch
    >>> DataDependentConvMixer(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    CONDITIONINGS = ("magnitude", "correlation")
    TRANSFORMS = ("fft", "fft_ortho", "dct")

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        map_size: int | tuple[int, int] = 14,
        conditioning: str = "magnitude",
        transform: str = "fft_ortho",
        short_kernel: int = 3,
        conditioning_kernel: int = 3,
        filter_dim: int = 64,
        position_dim: int = 33,
        filter_depth: int = 1,
        frequency: float = 10.0,
        residual: bool = True,
    ):
        super().__init__(dim, num_heads)
        size = to_2tuple(map_size)
        self.check_kernels(conditioning_kernel=conditioning_kernel)
        if conditioning not in self.CONDITIONINGS or transform not in self.TRANSFORMS:
            raise ValueError(
                f"DataDependentConvMixer: conditioning must be one of {self.CONDITIONINGS} and transform of "
                f"{self.TRANSFORMS}, got {conditioning=} and {transform=}"
            )
        if min(*size, short_kernel, filter_dim) < 1 or position_dim < 3 or position_dim % 2 == 0 or filter_depth < 0:
            raise ValueError(
                f"DataDependentConvMixer: map_size, short_kernel and filter_dim must be positive, position_dim odd and "
                f"at least 3, filter_depth not negative, got {map_size=}, {short_kernel=}, {filter_dim=}, "
                f"{position_dim=} and {filter_depth=}"
            )
        self.conditioning, self.transform = conditioning, transform
        network = {
            "hidden_dim": filter_dim,
            "position_dim": position_dim,
            "depth": filter_depth,
            "frequency": frequency,
        }
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_conv = nn.Conv1d(3 * dim, 3 * dim, short_kernel, groups=3 * dim)
        self.filter = ImplicitFilter(dim, size, **network)  # type: ignore[arg-type]
        self.residual = ImplicitFilter(dim, size, **network) if residual else None  # type: ignore[arg-type]
        outputs = 2 if conditioning == "magnitude" and transform != "dct" else 1  # real and imaginary parts
        self.first, self.second = ConvAlong(dim, conditioning_kernel), ConvAlong(dim, conditioning_kernel, outputs)
        self.out_proj = nn.Linear(dim, dim)

    @property
    def pair_bytes(self) -> int:
        """The matrix of the cosine transform and what it is made from."""
        return 8 if self.transform == "dct" else 0

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        size = (x.shape[1], x.shape[2])
        row = x.flatten(1, 2).unsqueeze(1)  # [B, 1, N, C]
        projected = self.in_proj(row)
        short = F.pad(projected.squeeze(1).mT, (self.short_conv.kernel_size[0] - 1, 0))
        outer, inner, y = self.short_conv(short).mT.unsqueeze(1).chunk(3, dim=-1)
        wide = torch.promote_types(projected.dtype, torch.float32)
        made = self._conditioned(projected[..., -self.dim :], wide)
        with without_autocast(x.device):
            kernel, own = self.filter(size)
            y = self._convolve((y * inner).to(wide), self._forward(kernel) + made, own)
            y = y * outer.to(wide)
            if self.residual is not None:
                kernel, own = self.residual(size)
                y = y + self._convolve(row.to(wide), self._forward(kernel), own)
            y = y.to(projected.dtype)
        return self.out_proj(y).reshape(x.shape)

    def _conditioned(self, x: Tensor, wide: torch.dtype) -> Tensor:
        """Return the spectrum of the kernel that the input [B, 1, N, C] asks for."""
        first = self.first(x).to(wide)
        if self.conditioning == "correlation":
            second = self.second(x).to(wide)
            with without_autocast(x.device):
                return self._forward(first).conj() * self._forward(second)
        with without_autocast(x.device):
            spectrum = self._forward(first)
            size = spectrum.real.square() + spectrum.imag.square() if spectrum.is_complex() else spectrum.abs()
        out = self.second(size)
        return torch.complex(*out.unflatten(-1, (-1, 2)).unbind(-1)) if spectrum.is_complex() else out

    def _convolve(self, x: Tensor, kernel: Tensor, own: Tensor) -> Tensor:
        return self._inverse(self._forward(x) * kernel, x.shape[2]) + x * own

    def _forward(self, x: Tensor) -> Tensor:
        """Transform [B, 1, N, C] along N."""
        if self.transform == "dct":
            return _dct_matrix(x) @ x
        return rfft2(x) if self.transform == "fft_ortho" else rfft2(x) * x.shape[2] ** -0.5

    def _inverse(self, spectrum: Tensor, count: int) -> Tensor:
        if self.transform == "dct":
            return _dct_matrix(spectrum).mT @ spectrum
        return irfft2(spectrum, count) if self.transform == "fft_ortho" else irfft2(spectrum, count) * count**0.5


def _dct_matrix(x: Tensor) -> Tensor:
    """Return the orthonormal cosine transform (type II) of sequences [B, 1, N, C]: [N, N]."""
    count = x.shape[2]
    index = torch.arange(count, device=x.device, dtype=x.dtype)
    matrix = torch.cos(math.pi / count * index[:, None] * (index + 0.5)) * (2 / count) ** 0.5
    return torch.where(index[:, None] == 0, matrix * 0.5**0.5, matrix)
