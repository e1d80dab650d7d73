"""Quantization-aware training: quantizers, where they stand in a model, and how weights are kept from oscillating."""

from visionzoo.quantization.annealing import Annealing, far_from_rounding
from visionzoo.quantization.attention import QuantizedProducts, QueryKeyProjection
from visionzoo.quantization.layers import QuantizedConv2d, QuantizedLinear
from visionzoo.quantization.model import Quantized, calibrate, describe, holds_quantizers, is_quantized, quantize
from visionzoo.quantization.quantizers import LSQ, StatsQ

__all__ = [
    "LSQ",
    "Annealing",
    "Quantized",
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizedProducts",
    "QueryKeyProjection",
    "StatsQ",
    "calibrate",
    "describe",
    "far_from_rounding",
    "holds_quantizers",
    "is_quantized",
    "quantize",
]
