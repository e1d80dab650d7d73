"""A trained quantized model as one that holds whole numbers: weights as int8, and activations on the way."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.deploy.int_operators import dequantize, round_to_levels
from visionzoo.quantization import LSQ, QuantizedConv2d, QuantizedLinear, QueryKeyProjection
from visionzoo.text import count_of


class Rounded(nn.Module):
    """LSQ as it is run: numbers to multiples of its scales.

    Args:
        quantizer: whose scales have begun.
        shift_after: whether its second shift is added here; else it is part of a layer's bias.
    """

    scale: Tensor
    one: Tensor
    low: Tensor
    high: Tensor
    before: Tensor | None
    after: Tensor | None

    def __init__(self, quantizer: LSQ, *, shift_after: bool = True):
        super().__init__()
        shift = quantizer.shift or ()
        scale = quantizer.steps()
        self.single = scale.numel() == 1
        self.fills_byte = quantizer.bits == 8
        self.zero = -128 if self.fills_byte and quantizer.low == 0 else 0
        self.register_buffer("scale", scale.reshape(()) if self.single else scale)
        self.register_buffer("one", torch.ones_like(scale.flatten()[0]))
        self.register_buffer("low", quantizer.low * self.scale if self.single else quantizer.low.clone())
        self.register_buffer("high", quantizer.high * self.scale if self.single else quantizer.high.clone())
        for name, given in (("before", quantizer.before), ("after", quantizer.after if shift_after else None)):
            self.register_buffer(name, None if given is None else given.detach().view(shift).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Round numbers of any shape that the scales can be broadcast to."""
        if self.before is not None:
            x = x + self.before
        step = self.scale if self.single else self.one
        x = x if self.single else x / self.scale
        if not self.fills_byte:
            x = torch.minimum(torch.maximum(x, self.low), self.high)
        x = round_to_levels(x, step, self.zero)
        x = x if self.single else x * self.scale
        return x if self.after is None else x + self.after


class IntegerWeight(nn.Module):
    """A weight as int8, with a scale for each of its rows.

    Args:
        quantizer: `StatsQ` or `LSQ`.
        weight: what it quantizes, [rows, ...].
        rows: the axis that the rows are to be along.
    """

    integers: Tensor
    scale: Tensor

    def __init__(self, quantizer: Any, weight: Tensor, rows: int = 0):
        super().__init__()
        integers, scale = quantizer.integers(weight.detach())
        self.rows = rows
        self.register_buffer("integers", integers.to(torch.int8).transpose(0, rows).contiguous())
        self.register_buffer("scale", scale.detach().flatten().clone())

    def forward(self) -> Tensor:
        """Return the weight as it computes."""
        return dequantize(self.integers, self.scale, self.rows)


class IntegerLinear(nn.Module):
    """`QuantizedLinear` of whole numbers; the second shift of its input is part of the bias."""

    bias: Tensor

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        self.input = Rounded(layer.quantize_input, shift_after=False)
        self.weight = IntegerWeight(layer.quantize_weight, layer.weight, rows=1)
        self.register_buffer("bias", _bias(layer, layer.weight.new_zeros(1, layer.in_features)).flatten())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.input(x) @ self.weight() + self.bias


class IntegerConv2d(nn.Module):
    """`QuantizedConv2d` of whole numbers."""

    bias: Tensor | None

    def __init__(self, layer: QuantizedConv2d):
        super().__init__()
        self.input = Rounded(layer.quantize_input, shift_after=False)
        self.weight = IntegerWeight(layer.quantize_weight, layer.weight)
        reach = [(size - 1) * d + 1 for size, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        bias = None if layer.bias is None else layer.bias.detach().clone()
        if layer.quantize_input.after is not None:  # then nothing is padded
            bias = _bias(layer, layer.weight.new_zeros(1, layer.in_channels, *reach)).flatten()
        self.register_buffer("bias", bias)
        self.options: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H', W']."""
        return F.conv2d(self.input(x), self.weight(), self.bias, *self.options)


class IntegerQueryKeyProjection(nn.Module):
    """`QueryKeyProjection` of whole numbers."""

    after: Tensor
    key_bias: Tensor
    value_bias: Tensor

    def __init__(self, projection: QueryKeyProjection):
        super().__init__()
        product, value = projection._parts()
        after: Any = projection.quantize_input.after
        self.heads = (projection.num_heads, -1)
        self.input = Rounded(projection.quantize_input, shift_after=False)
        self.product = IntegerWeight(projection.quantize_product, product, rows=1)
        self.value = IntegerWeight(projection.quantize_weight, value, rows=1)
        self.register_buffer("after", after.detach().clone())
        self.register_buffer("key_bias", after.detach() @ self.product())
        bias = 0 if projection.bias is None else projection.bias[-len(value) :].detach()
        self.register_buffer("value_bias", after.detach() @ self.value() + bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., C] to queries and keys [..., G, C] and values [..., G, D]."""
        x = self.input(x)
        k, v = x @ self.product() + self.key_bias, x @ self.value() + self.value_bias
        q = (x + self.after).unsqueeze(-2).expand(*x.shape[:-1], *self.heads)
        return q, k.unflatten(-1, self.heads), v.unflatten(-1, self.heads)


PARTS: dict[type[nn.Module], Any] = {
    QuantizedLinear: IntegerLinear,
    QuantizedConv2d: IntegerConv2d,
    QueryKeyProjection: IntegerQueryKeyProjection,
    LSQ: Rounded,
}


@torch.no_grad()
def to_integers(model: nn.Module) -> nn.Module:
    """Return a copy of a quantized model that holds whole numbers, in eval mode, with the same outputs up to rounding.

    Layers that are never called stay as they are.
    """
    made: dict[int, nn.Module] = {}

    def converted(module: nn.Module) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        part = PARTS.get(type(module))
        quantizer = module if isinstance(module, LSQ) else getattr(module, "quantize_input", None)
        if part is not None and isinstance(quantizer, LSQ) and quantizer.begun:
            made[id(module)] = part(module)
        else:
            made[id(module)] = module
            for name, child in module.named_children():
                setattr(module, name, converted(child))
        return made[id(module)]

    return converted(copy.deepcopy(model).eval()).requires_grad_(False)


def holds_integers(model: nn.Module) -> bool:
    """Whether `to_integers` has made a model."""
    return any(isinstance(module, IntegerWeight) for module in model.modules())


def count_weights(model: nn.Module) -> str:
    """Return how many weights of a model are whole numbers, and how much memory they take, in words."""
    weights = [module.integers for module in model.modules() if isinstance(module, IntegerWeight)]
    numbers = sum(weight.numel() for weight in weights)
    return (
        f"{count_of(len(weights), 'weight')} of {numbers:,} whole numbers, {numbers / 1e6:.3g} MB as bytes, "
        f"{4 * numbers / 1e6:.3g} MB as float32"
    )


def _bias(layer: Any, zeros: Tensor) -> Tensor:
    """Return what a layer makes of an input of zeros and its second shift: its bias and that of the shift."""
    after = layer.quantize_input.after
    x = zeros if after is None else zeros + after.detach().view(layer.quantize_input.shift)
    x, weight = x.double(), layer.quantize_weight(layer.weight).detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, nn.Linear):
        out = F.linear(x, weight, bias)
    else:
        out = F.conv2d(x, weight, bias, dilation=layer.dilation, groups=layer.groups)
    return out.to(layer.weight.dtype)
