"""The formats of torch and ONNX: how a model is written in one, and how its file is read to be checked."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from visionzoo._torch_private import (
    aoti_compile_and_package,
    aoti_load_package,
    find_cpp_compiler,
    tree_leaves,
    without_special_ones,
)
from visionzoo.deploy.checking import Shape
from visionzoo.deploy.int_operators import INT4_OPSET, as_operators, pack_int4, translations
from visionzoo.deploy.integers import holds_integers
from visionzoo.engine.errors import UserError, require
from visionzoo.text import count_of


def trace(model: nn.Module, example: Tensor, shape: Shape) -> ExportedProgram:
    """Return torch's exported program of a model.

    Raises:
        UserError: it would hold operators that are visionzoo's own.
    """
    dynamic: dict[int, Any] = {axis: Dim.DYNAMIC for axis in shape.dynamic_axes}
    if shape.dynamic_size and shape.dynamic_batch:
        dynamic[0] = Dim("batch", min=2)  # torch lets such programs take 1 as well
    with torch.no_grad(), without_special_ones() if shape.dynamic_size else nullcontext():
        program = torch.export.export(model, (example,), dynamic_shapes=(dynamic,), strict=False)
    own = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("visionzoo.")}
    if own:
        raise UserError(_OWN_OPERATORS.format(", ".join(sorted(own))))
    return program


_OWN_OPERATORS = (
    "the model asks for Triton kernels by name ({}), which only run where visionzoo does; export it outside of "
    "visionzoo.use_backend('triton'), without visionzoo.set_backend and with VISIONZOO_BACKEND unset"
)


def _write_program(
    model: nn.Module, path: Path, example: Tensor, shape: Shape, input_name: str, output_names: list[str], opset: Any
) -> None:
    content = io.BytesIO()  # torch ends the process where it writes to a disk that is full
    torch.export.save(trace(model, example, shape), content)
    path.write_bytes(content.getbuffer())


def _load_program(path: Path) -> Callable[[Tensor], list[Tensor]]:
    module = torch.export.load(path).module()
    return lambda image: tree_leaves(module(image))


def _write_package(
    model: nn.Module, path: Path, example: Tensor, shape: Shape, input_name: str, output_names: list[str], opset: Any
) -> None:
    require_compiler()
    program = trace(model, example, shape)
    aoti_compile_and_package(program, package_path=str(path))


def _load_package(path: Path) -> Callable[[Tensor], list[Tensor]]:
    module = aoti_load_package(str(path))
    return lambda image: tree_leaves(module(image))


def _optimize(model: Any) -> None:
    """Do what torch.onnx does by itself, but leave tables that are resized to the runtime.

    onnx's own evaluator, which computes what is constant, makes smaller tables of the wrong numbers (onnx 1.23.2).
    """
    import onnxscript.optimizer

    onnxscript.optimizer.optimize_ir(model, should_fold=lambda node: False if node.op_type == "Resize" else None)


def _write_onnx(
    model: nn.Module, path: Path, example: Tensor, shape: Shape, input_name: str, output_names: list[str], opset: Any
) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, extra="export")
    options: dict[str, Any] = {"opset_version": opset}
    if integers := holds_integers(model):
        options = {"opset_version": opset or INT4_OPSET, "custom_translation_table": translations()}
    try:
        with torch.no_grad(), as_operators():  # with gradients torch may trace other kernels than it turns into ONNX
            program: Any = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                optimize=False,  # see `_optimize`
                verbose=False,
                input_names=[input_name],
                output_names=output_names,
                dynamic_shapes=(shape.dynamic_axes,),
                **options,
            )
    except Exception as error:
        if "op='visionzoo." in (text := last_words(error)):
            raise UserError(_OWN_OPERATORS.format(text)) from error
        raise
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise UserError(
            f"--opset {opset}: torch {torch.__version__} writes this model in opset {written} and cannot turn it into "
            f"{opset}; leave --opset out, or convert the file by onnx.version_converter"
        )
    _optimize(program.model)
    for node in program.model.graph:  # torch notes where on this machine its code lies
        node.metadata_props.clear()
    if integers:
        print(f"onnx: {count_of(pack_int4(program), 'weight')} in 4 bits, opset {written}")
    program.save(path)


def _load_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    onnxruntime = require("onnxruntime", extra="export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: [torch.from_numpy(out) for out in session.run(None, {name: image.cpu().numpy()})]


@dataclass(frozen=True)
class Format:
    """How a format is written, and read again to be checked."""

    suffix: str
    write: Callable[..., None]
    load: Callable[[Path], Callable[[Tensor], list[Tensor]]]


FORMATS = {
    "pt2": Format(".pt2", _write_program, _load_program),  # torch.export.load(FILE).module()
    "onnx": Format(".onnx", _write_onnx, _load_onnx),
    "aoti": Format(".aoti.pt2", _write_package, _load_package),  # torch._inductor.aoti_load_package(FILE)
}


def require_compiler() -> str:
    """Return the C++ compiler that AOTInductor will call.

    Raises:
        UserError: there is none.
    """
    try:
        return find_cpp_compiler()
    except Exception as error:  # InvalidCxxCompiler, which moved between releases
        raise UserError(
            f"--format aoti compiles C++ and finds no compiler ({str(error).splitlines()[0]}); install one (apt "
            f"install g++, conda install gxx, on Windows Visual Studio), name it in the variable CXX, or take --format "
            f"onnx pt2"
        ) from error


def last_words(error: BaseException) -> str:
    """Return what the innermost cause of an error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)
