"""Layers with quantized weights and inputs, which torch's own become."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.quantization.quantizers import LSQ, StatsQ

QUANTIZERS = ("statsq", "lsq")


def weight_quantizer(kind: str, bits: int, weight: Tensor) -> nn.Module:
    """Return the quantizer of a weight [rows, ...]; one of 8 bits is LSQ."""
    if kind == "statsq" and bits < 8:
        return StatsQ(bits)
    return LSQ(bits, (weight.shape[0], *(1,) * (weight.ndim - 1)))


class QuantizedLinear(nn.Linear):
    """A linear layer on quantized inputs, by a quantized weight; `quantize_layer` makes it of torch's."""

    quantize_weight: nn.Module
    quantize_input: LSQ

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(self.quantize_input(input), self.quantize_weight(self.weight), self.bias)


class QuantizedConv2d(nn.Conv2d):
    """A convolution of quantized inputs with a quantized weight; `quantize_layer` makes it of torch's."""

    quantize_weight: nn.Module
    quantize_input: LSQ

    def forward(self, input: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H', W']."""
        options: Any = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(self.quantize_input(input), self.quantize_weight(self.weight), self.bias, *options)


QUANTIZED: dict[type[nn.Module], Any] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}


def is_quantizable(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's own, none of their subclasses, and pads with zeros if at all."""
    return type(layer) in QUANTIZED and getattr(layer, "padding_mode", "zeros") == "zeros"


def quantize_layer(
    layer: nn.Module, weights: int, activations: int, *, kind: str, signed: bool, each_channel: bool = False
) -> None:
    """Make a layer of torch's a quantized one, in place: its tensors keep their names, hooks stay.

    Args:
        layer: one that `is_quantizable`.
        weights: bits of the weight.
        activations: bits of the input.
        kind: of the weight's quantizer, "statsq" or "lsq".
        signed: whether inputs are signed; see `LSQ`.
        each_channel: have a scale for each channel of the input; else one.
    """
    made: Any = layer
    made.__class__ = QUANTIZED[type(layer)]
    is_conv = isinstance(layer, nn.Conv2d)
    shape = (made.in_channels, 1, 1) if is_conv else (made.in_features,)
    # a shift after the quantizer is part of the bias in the end, but for the zeros around a padded map, which lack it
    padded = is_conv and made.padding not in ("valid", (0, 0))
    scales = shape if each_channel else ()
    made.quantize_input = LSQ(activations, scales, signed=signed, shift=shape, shift_after=not padded)
    made.quantize_weight = weight_quantizer(kind, weights, made.weight)
    made.to(made.weight.device, made.weight.dtype)
