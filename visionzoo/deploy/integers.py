"""A trained quantized model as one that holds whole numbers: weights of 4 or 8 bits, and activations on the way.

torch's own formats hold weights as int8 with the products that make numbers of them. ONNX has operators for it,
QuantizeLinear and DequantizeLinear, which runtimes turn into arithmetic of whole numbers where they have it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.quantization import LSQ, QuantizedConv2d, QuantizedLinear, QueryKeyProjection
from visionzoo.text import count_of

INT4_OPSET = 21  # of ONNX: the first with 4-bit numbers
FLOAT, INT8 = 1, 3  # as onnx.TensorProto numbers them
_operators = False  # whether calls become operators that ONNX has a translation for


@contextmanager
def as_operators() -> Iterator[None]:
    """Let what is traced in a `with` block hold operators in place of products and roundings."""
    global _operators
    _operators = True
    try:
        yield
    finally:
        _operators = False


@torch.library.custom_op("visionzoo::dequantize_linear", mutates_args=())
def dequantize_linear(integers: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Return whole numbers times the scale of their place along an axis."""
    shape = [1] * integers.ndim
    shape[axis] = -1
    return integers.to(scale.dtype) * scale.view(shape)


@dequantize_linear.register_fake
def _(integers: Tensor, scale: Tensor, axis: int) -> Tensor:
    return integers.new_empty(integers.shape, dtype=scale.dtype)


@torch.library.custom_op("visionzoo::round_to_levels", mutates_args=())
def round_to_levels(x: Tensor, scale: Tensor, zero: int) -> Tensor:
    """Return the multiples of one scale that are nearest to numbers, where `zero` more is within -128 and 127."""
    return (x / scale).round().clamp(-128 - zero, 127 - zero) * scale


@round_to_levels.register_fake
def _(x: Tensor, scale: Tensor, zero: int) -> Tensor:
    return torch.empty_like(x)


def translations() -> dict[Any, Any]:
    """Return what these operators are in ONNX, for `torch.onnx.export`."""
    import onnxscript

    op: Any = onnxscript.opset18

    def dequantize(integers: Any, scale: Any, axis: int) -> Any:
        return op.DequantizeLinear(integers, scale, axis=axis)

    def levels(x: Any, scale: Any, zero: int) -> Any:
        place = op.Cast(op.Constant(value_int=zero), to=INT8)
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, place), scale, place)

    return {
        torch.ops.visionzoo.dequantize_linear.default: dequantize,
        torch.ops.visionzoo.round_to_levels.default: levels,
    }


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
        if _operators:
            x = round_to_levels(x, step, self.zero)
        else:
            x = (x / step).round().clamp(-128 - self.zero, 127 - self.zero) * step
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
        if _operators:
            return dequantize_linear(self.integers, self.scale, self.rows)
        shape = [1] * self.integers.ndim
        shape[self.rows] = -1
        return self.integers.to(self.scale.dtype) * self.scale.view(shape)


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


def pack_int4(program: Any) -> int:
    """Let an ONNX program hold weights that fit 4 bits in 4 bits, where operators and onnxruntime take them.

    Odd numbers from -15 to 15, as StatsQ of 4 bits has them, fit as 2k + 1. All become bytes before they are used, once
    when the file is loaded: onnxruntime multiplies bytes by bytes, while for products with 4-bit weights it rounds the
    other factor anew.

    Args:
        program: what `torch.onnx.export` returns.

    Returns:
        the number of weights that are packed.
    """
    import ml_dtypes
    import onnx_ir as ir

    model = program.model
    if model.opset_imports[""] < INT4_OPSET or not _runs_int4():
        return 0
    packed = 0
    for value in list(model.graph.initializers.values()):
        uses = list(value.uses())
        if value.dtype != ir.DataType.INT8 or any(node.op_type != "DequantizeLinear" for node, _ in uses):
            continue
        numbers = value.const_value.numpy()
        fits = bool(numbers.min() >= -8 and numbers.max() <= 7)
        odd = bool((numbers % 2 == 1).all() and numbers.min() >= -15 and numbers.max() <= 15)
        if numbers.ndim < 2 or not (fits or odd):
            continue
        small = (numbers if fits else (numbers - 1) // 2).astype(ml_dtypes.int4)
        value.const_value = ir.tensor(small, dtype=ir.DataType.INT4, name=value.name)
        value.dtype = ir.DataType.INT4
        if fits:
            nodes = [ir.node("Cast", [value], {"to": INT8})]
        else:
            nodes = [ir.node("Cast", [value], {"to": FLOAT}), ir.node("Constant", [], {"value_float": 2.0})]
            nodes += [
                ir.node("Mul", [node.outputs[0] for node in nodes]),
                ir.node("Constant", [], {"value_float": 1.0}),
            ]
            nodes += [ir.node("Add", [node.outputs[0] for node in nodes[2:]])]
            nodes += [ir.node("Cast", [nodes[-1].outputs[0]], {"to": INT8})]
        for step, node in enumerate(nodes):
            node.name = node.outputs[0].name = f"{value.name}_bytes{step}"
        model.graph.insert_before(uses[0][0], nodes)
        for node, index in uses:
            node.replace_input_with(index, nodes[-1].outputs[0])
        packed += 1
    return packed


@cache
def _runs_int4() -> bool:
    """Whether onnxruntime here makes bytes of 4-bit numbers."""
    import onnxruntime
    from onnx import TensorProto, helper

    made = helper.make_tensor_value_info("y", TensorProto.INT8, [2])
    weight = helper.make_tensor("w", TensorProto.INT4, [2], [-8, 7])
    graph = helper.make_graph([helper.make_node("Cast", ["w"], ["y"], to=INT8)], "cast", [], [made], [weight])
    opset = helper.make_opsetid("", INT4_OPSET)
    try:
        content = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return session.run(None, {})[0].tolist() == [-8, 7]
    except Exception:  # of whatever class: it was not made for it
        return False


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
