"""Quantizers whose rounding has the gradient of no rounding: StatsQ for weights, LSQ for activations and weights.

Facts from https://github.com/nbasyl/OFQ at 7ed37d1 (MIT), the code of "Oscillation-free Quantization for Low-bit Vision
Transformers" (arXiv:2302.02210); LSQ is that of arXiv:1902.08153.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1e-5  # scale
LOWEST = -0.5  # below it no activation function goes that is not symmetric: GELU -0.17, SiLU -0.28, Hardswish -0.375
BITS = range(2, 9)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, origin: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, gradient


def straight_through(value: Tensor, origin: Tensor) -> Tensor:
    """Return `value`, to the bit, with the gradient of `origin`."""
    return _StraightThrough.apply(value, origin)


def check_bits(bits: int, what: str) -> int:
    """Return the number of bits.

    Raises:
        ValueError: it is no whole number from 2 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"{what}: expected 2 to 8 bits, got {bits!r}")
    return bits


class StatsQ(nn.Module):
    """Weights to 2ᵇ levels of odd numbers, whose scale is a statistic of each row and is not learned.

        s = 2·mean|w| of a row, n = 2ᵇ⁻¹:  ŵ = s / 2n · (2·⌊n·clamp(w / s, -1, 1)⌋ + 1)

    The gradient of ŵ is that of w, also where it was clamped.

    Args:
        bits: b, from 2 to 7; beyond, odd numbers would not fit a byte.

    Raises:
        ValueError: there are other bits.

    >>> StatsQ(2)(torch.tensor([[-3.0, -0.1, 0.1, 3.0]]))
    tensor([[-2.3250, -0.7750,  0.7750,  2.3250]])
    """

    def __init__(self, bits: int):
        super().__init__()
        if check_bits(bits, "StatsQ") == 8:
            raise ValueError("StatsQ: expected 2 to 7 bits, got 8; take LSQ")
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        """Quantize [rows, ...]."""
        integers, scale = self.integers(weight)
        return straight_through(integers * scale, weight)

    def before_rounding(self, weight: Tensor) -> Tensor:
        """Return the numbers [rows, ...] that are rounded, to levels from -n to n - 1."""
        levels = 2 ** (self.bits - 1)
        clamped = (weight / self._scale(weight)).clamp(-1.0, 1.0 - 1e-6)
        return clamped * levels - 0.5

    @torch.no_grad()
    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return odd whole numbers of the shape of the weight, and the scale [rows, 1, ...] that they are times."""
        rounded = self.before_rounding(weight).round()
        return 2 * rounded + 1, self._scale(weight) / 2**self.bits

    @staticmethod
    def _scale(weight: Tensor) -> Tensor:
        axes = tuple(range(1, weight.ndim))
        scale = 2 * weight.detach().abs().mean(axes, keepdim=True)
        return scale.clamp(min=torch.finfo(weight.dtype).tiny)  # of rows of zeros, as some layers begin

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"bits={self.bits}"


class LSQ(nn.Module):
    """Numbers to 2ᵇ levels whose scale is learned, between two shifts that may be learned, too.

        x̂ = s · round(clamp((x + before) / s, low, low + 2ᵇ - 1)) + after

    The gradient of the scale is divided by the root of the highest level times the numbers that share it.
    Where the scale is 0 it has not begun: `calibrate` begins it by the numbers that it sees.

    Args:
        bits: b, from 2 to 8.
        shape: of the scales, broadcast to the last axes of what is quantized; () for one scale.
        signed: whether levels are from -2ᵇ⁻¹, or from 0. Where the numbers that calibration sees go below -0.5, they
            are signed all the same.
        shift: shape of the shifts, broadcast likewise; None for none.
        shift_after: whether there is the second shift, too.

    Raises:
        ValueError: there are other bits.

    >>> quantizer = LSQ(4)
    >>> quantizer.calibrating = True
    >>> quantizer(torch.tensor([-1.0, 0.3, 1.0])).detach().round(decimals=2)
    tensor([-1.1600,  0.5800,  1.1600])
    """

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (),
        *,
        signed: bool = True,
        shift: tuple[int, ...] | None = None,
        shift_after: bool = True,
    ):
        super().__init__()
        self.bits = check_bits(bits, "LSQ")
        self.shape, self.shift = shape, shift
        self.calibrating = False
        self.scale = nn.Parameter(torch.zeros(prod(shape)))  # of one axis, so that optimizers do not decay it
        self.before = None if shift is None else nn.Parameter(torch.zeros(prod(shift)))
        self.after = None if shift is None or not shift_after else nn.Parameter(torch.zeros(prod(shift)))
        self.register_buffer("low", torch.tensor(-(2.0 ** (bits - 1)) if signed else 0.0))
        self.low: Tensor

    @property
    def high(self) -> Tensor:
        """The highest level."""
        return self.low + (2**self.bits - 1)

    @property
    def begun(self) -> bool:
        """Whether there are scales."""
        return bool(self.scale.all())

    def takes(self, scale: Tensor, low: Tensor) -> bool:
        """Whether scales and the lowest level, of a checkpoint, are of as many scales and bits as here."""
        return scale.shape == self.scale.shape and float(low) in (0.0, -(2.0 ** (self.bits - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize numbers of any shape that the scales can be broadcast to."""
        if self.before is not None:
            x = x + self.before.view(self.shift or ())
        if self.calibrating and not self.begun:
            self._begin(x)
        share = (self.high * (x.numel() // self.scale.numel())) ** -0.5
        scale = straight_through(self.scale.clamp(min=SMALLEST), self.scale * share).view(self.shape)
        levels = (x / scale).clamp(self.low, self.high)
        x = straight_through(levels.round(), levels) * scale
        return x if self.after is None else x + self.after.view(self.shift or ())

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        if self.low == 0 and x.min() < LOWEST:
            self.low.fill_(-(2.0 ** (self.bits - 1)))
        shape = (1,) * (x.ndim - len(self.shape)) + self.shape
        axes = [axis for axis, size in enumerate(shape) if size == 1]
        mean = x.abs().mean(axes).flatten() if axes else x.abs().flatten()
        factor = 4 if self.low == 0 and self.shape else 2  # as in the authors' code
        self.scale.copy_((factor * mean / self.high**0.5).clamp(min=SMALLEST))

    @torch.no_grad()
    def steps(self) -> Tensor:
        """Return the scales in their shape."""
        return self.scale.clamp(min=SMALLEST).view(self.shape)

    @torch.no_grad()
    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels of a weight, which has no shifts, and the scales that they are times."""
        return (weight / self.steps()).clamp(self.low, self.high).round(), self.steps()

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"bits={self.bits}, shape={self.shape}, shift={self.shift}"
