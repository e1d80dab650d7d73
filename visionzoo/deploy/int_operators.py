"""What whole numbers are in a program: products and roundings of torch's, or operators of ONNX.

ONNX has QuantizeLinear and DequantizeLinear, which runtimes turn into arithmetic of whole numbers where they have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

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


def dequantize(integers: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Return whole numbers times the scale of their place along an axis."""
    if _operators:
        return _dequantize_linear(integers, scale, axis)
    shape = [1] * integers.ndim
    shape[axis] = -1
    return integers.to(scale.dtype) * scale.view(shape)


def round_to_levels(x: Tensor, scale: Tensor, zero: int) -> Tensor:
    """Return the multiples of one scale that are nearest to numbers, where `zero` more is from -128 to 127."""
    if _operators:
        return _quantize_linear(x, scale, zero)
    return (x / scale).round().clamp(-128 - zero, 127 - zero) * scale


@torch.library.custom_op("visionzoo::dequantize_linear", mutates_args=())
def _dequantize_linear(integers: Tensor, scale: Tensor, axis: int) -> Tensor:
    raise NotImplementedError("it is only traced")


@_dequantize_linear.register_fake
def _(integers: Tensor, scale: Tensor, axis: int) -> Tensor:
    return integers.new_empty(integers.shape, dtype=scale.dtype)


@torch.library.custom_op("visionzoo::quantize_linear", mutates_args=())
def _quantize_linear(x: Tensor, scale: Tensor, zero: int) -> Tensor:
    raise NotImplementedError("it is only traced")


@_quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero: int) -> Tensor:
    return torch.empty_like(x)


def translations() -> dict[Any, Any]:
    """Return what these operators are in ONNX, for `torch.onnx.export`."""
    import onnxscript

    op: Any = onnxscript.opset18

    def dequantized(integers: Any, scale: Any, axis: int) -> Any:
        return op.DequantizeLinear(integers, scale, axis=axis)

    def rounded(x: Any, scale: Any, zero: int) -> Any:
        place = op.Cast(op.Constant(value_int=zero), to=INT8)
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, place), scale, place)

    own = torch.ops.visionzoo
    return {own.dequantize_linear.default: dequantized, own.quantize_linear.default: rounded}


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
