"""Files of one model in several formats, with a description of their input and output, and the flags they obey."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

import visionzoo
from visionzoo.deploy.exporting import FORMATS, Exported, Reference, Shape, export, require_compiler
from visionzoo.engine.checkpoints import write_atomically
from visionzoo.engine.errors import UserError, require


def write_files(
    model: nn.Module, stem: Path, shape: Shape, description: dict[str, Any], args: argparse.Namespace
) -> list[Exported]:
    """Write a model in `args.format`, each next to the others as `stem` with a suffix, and its description as JSON.

    Args:
        model: in eval mode, from images to tensors.
        stem: path of the files without a suffix.
        shape: of the images.
        description: what the JSON says of the model; its "outputs" name them in their order.
        args: the flags of `add_export_flags`.
    """
    try:
        reference = Reference.of(model, shape)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"the model does not take images of {shape}: {error}") from error
    if not args.no_fuse:
        model = visionzoo.fuse(model)
    files = []
    for format in dict.fromkeys(args.format):
        names = [output["name"] for output in description["outputs"]]
        path = stem.with_name(stem.name + FORMATS[format].suffix)
        files.append(export(model, path, format, shape, reference, output_names=names, opset=args.opset))
        print(f"{format}: {files[-1]}")
    sizes: list[Any] = [shape.dynamic_axes.get(axis, size) for axis, size in enumerate((shape.batch, *shape.size))]
    outputs = [
        {**output, "shape": _shape(tensor.shape, shape)}
        for output, tensor in zip(description["outputs"], reference.outputs[0], strict=True)
    ]
    content = {
        "visionzoo": visionzoo.__version__,
        "versions": versions(),
        "input": {"name": "image", "shape": sizes, "dtype": "float32"},
        **description,
        "outputs": outputs,
        "files": [{"file": file.path.name, "largest_error": file.error, "checked": file.checked} for file in files],
    }
    path = stem.with_name(stem.name + ".json")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    print(f"{path} says what goes in and comes out: {shape}")
    return files


def _shape(output: Sequence[int], shape: Shape) -> list[Any]:
    """Return the shape of an output, with names in the place of what is not fixed."""
    named: dict[int, str] = {0: "batch"} if shape.dynamic_batch else {}
    if shape.dynamic_size and len(output) == 4:
        named |= {2: "h", 3: "w"}
    return [named.get(axis, size) for axis, size in enumerate(output)]


def check_flags(args: argparse.Namespace) -> None:
    """Refuse at once what would fail after minutes.

    Raises:
        UserError: a package is missing, or a flag has no effect here.
    """
    if "onnx" in args.format:
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, extra="export")
    if "aoti" in args.format:
        require_compiler()
    if args.batch_size < 1:
        raise UserError(f"--batch-size: expected a positive number, got {args.batch_size}")
    if args.batch_size > 1 and not args.static_batch:
        raise UserError("--batch-size is of files that take that batch alone: add --static-batch, or leave it out")
    if getattr(args, "torchcompile", None):
        raise UserError("--torchcompile has no effect on files; --format aoti compiles")


def shape_of(args: argparse.Namespace, size: Sequence[int]) -> Shape:
    """Return the shape of the images that flags ask for, given the model's (channels, height, width)."""
    channels, height, width = size
    return Shape(args.batch_size, (channels, height, width), not args.static_batch, args.dynamic_size)


def versions() -> dict[str, str]:
    """Return which versions of the packages that take part are installed."""
    found = {}
    for name in ("torch", "timm", "onnx", "onnxscript", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
