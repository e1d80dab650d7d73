"""Files of one model in several formats, with a description of their input and output, and the flags they obey."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from glob import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import visionzoo
from visionzoo.deploy.checking import Reference, Shape
from visionzoo.deploy.exporting import Exported, export
from visionzoo.deploy.flags import FilesConfig
from visionzoo.deploy.formats import FORMATS, require_compiler
from visionzoo.deploy.integers import count_weights, to_integers
from visionzoo.engine.checkpoints import write_atomically
from visionzoo.engine.errors import UserError, require
from visionzoo.quantization import is_quantized


def write_files(
    model: nn.Module, stem: Path, shape: Shape, description: dict[str, Any], given: FilesConfig
) -> list[Exported]:
    """Write a model in `given.format`, each next to the others as `stem` with a suffix, and its description as JSON.

    Files of the same model and description in other formats stay, and stay described. Those of another one are replaced
    with only `given.overwrite`, all of them.

    Args:
        model: in eval mode, from images to tensors.
        stem: path of the files without a suffix.
        shape: of the images.
        description: what the JSON says of the model; its "outputs" name them in their order.
        given: which formats, and how.

    Raises:
        UserError: the model cannot be exported so, the files cannot be written, or others lie there.
    """
    try:
        reference = Reference.of(model, shape)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"the model does not take images of {shape}: {error}") from error
    sizes: list[Any] = [shape.dynamic_axes.get(axis, size) for axis, size in enumerate((shape.batch, *shape.size))]
    outputs = [
        {**output, "shape": _shape(tensor.shape, shape)}
        for output, tensor in zip(description["outputs"], reference.outputs[0], strict=True)
    ]
    content = {
        "input": {"name": "image", "shape": sizes, "dtype": "float32"},
        **description,
        "outputs": outputs,
        "weights": _digest(model),
    }
    described, others = _look_at(stem, content)
    if others and not given.overwrite:
        listed = ", ".join(path.name for path in others)
        raise UserError(
            f"{stem.parent} holds {listed} of another model, or of other weights or images; name another --output, or "
            "pass --overwrite to replace them all"
        )
    if is_quantized(model):
        model = to_integers(model)
        print(f"quantized: {count_weights(model)}")
    elif not given.no_fuse:
        model = visionzoo.fuse(model)
    files = []
    for format in dict.fromkeys(given.format):
        names = [output["name"] for output in description["outputs"]]
        path = _with(stem, FORMATS[format].suffix)
        files.append(export(model, path, format, shape, reference, output_names=names, opset=given.opset))
        print(f"{format}: {files[-1]}")
    new = [{"file": file.path.name, "largest_error": file.error, "checked": file.checked} for file in files]
    kept = [entry for entry in described if entry["file"] not in {file.path.name for file in files}]
    path = _with(stem, ".json")
    whole = {"visionzoo": visionzoo.__version__, "versions": versions(), **content, "files": [*new, *kept]}
    text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))
    for other in others:  # that the new export has not replaced
        if other != path and not any(other.name.startswith(file.path.name) for file in files):
            other.unlink()
            print(f"{other} of the earlier export is removed")
    print(f"{path} says what goes in and comes out: {shape}")
    return files


def _with(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _look_at(stem: Path, content: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return what is described of files of the same export that are there, or which files of another one are."""
    path = _with(stem, ".json")
    patterns = [f"{escape(stem.name)}{format.suffix}*" for format in FORMATS.values()]  # weights beside ONNX too
    there = [file for pattern in patterns for file in sorted(stem.parent.glob(pattern))]
    if not path.exists():
        return [], there
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = json.loads(json.dumps(content)).items() <= found.items()
        described = [entry for entry in found["files"] if path.with_name(entry["file"]).exists()]
    except (OSError, ValueError, TypeError, AttributeError, KeyError):  # not of ours
        return [], [path, *there]
    return (described, []) if same else ([], [path, *there])


def _digest(model: nn.Module) -> str:
    """Return a checksum of a model's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _shape(output: Sequence[int], shape: Shape) -> list[Any]:
    """Return the shape of an output, with names for what is not fixed."""
    named: dict[int, str] = {0: "batch"} if shape.dynamic_batch else {}
    if shape.dynamic_size and len(output) == 4:
        named |= {2: "h", 3: "w"}
    return [named.get(axis, size) for axis, size in enumerate(output)]


def check_flags(given: FilesConfig, *, torchcompile: str | None = None) -> None:
    """Refuse at once what would fail after minutes.

    Raises:
        UserError: a package is missing, or a flag has no effect here.
    """
    if "onnx" in given.format:
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, extra="export")
    if "aoti" in given.format:
        require_compiler()
    if given.batch_size < 1:
        raise UserError(f"--batch-size: expected a positive number, got {given.batch_size}")
    if given.batch_size > 1 and not given.static_batch:
        raise UserError("--batch-size is for files that take only that batch: add --static-batch, or leave it out")
    if given.opset is not None and "onnx" not in given.format:
        raise UserError(f"--opset is of ONNX, and --format {' '.join(given.format)} writes none; leave it out")
    if torchcompile:
        raise UserError("--torchcompile has no effect on files; --format aoti compiles")


def shape_of(given: FilesConfig, size: Sequence[int]) -> Shape:
    """Return the shape of the images that flags ask for, given the model's (channels, height, width)."""
    channels, height, width = size
    return Shape(given.batch_size, (channels, height, width), not given.static_batch, given.dynamic_size)


def versions() -> dict[str, str]:
    """Return which versions of the packages that take part are installed."""
    found = {}
    for name in ("torch", "timm", "onnx", "onnxscript", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
