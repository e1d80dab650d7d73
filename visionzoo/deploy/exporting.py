"""One model to one file, in a format of torch's or ONNX, and the comparison of that file with the model."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
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
from visionzoo.deploy.int_operators import INT4_OPSET, as_operators, pack_int4, translations
from visionzoo.deploy.integers import holds_integers
from visionzoo.engine.checkpoints import make_folder
from visionzoo.engine.errors import UserError, require
from visionzoo.engine.interruption import SIGNALS
from visionzoo.text import count_of

TOLERANCE = 1e-3  # largest error of an output; of outputs beyond 1 in proportion
NOISE = 1e-4  # in images, a hundredth of a step between two values of a pixel
SHARE = 0.05  # largest error of an output over what outputs change by from image to image
AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class Shape:
    """Of the images that an exported model takes.

    Attributes:
        batch: images of a batch; where that is dynamic, of the example that is traced.
        size: channels, height and width; likewise.
        dynamic_batch: take any number of images.
        dynamic_size: take any height and width.
    """

    batch: int
    size: tuple[int, int, int]
    dynamic_batch: bool = True
    dynamic_size: bool = False

    def example(self) -> tuple[int, ...]:
        """Return the shape to trace with, in which nothing is special that the exported program would rely on.

        A dynamic batch of 1 would be taken for a constant; maps that windows divide, for maps that they always divide.
        """
        channels, height, width = self.size
        size = (height + 37, width + 69) if self.dynamic_size else (height, width)
        return (max(self.batch, 2) if self.dynamic_batch else self.batch, channels, *size)

    def to_check(self) -> list[tuple[int, ...]]:
        """Return the shapes at which a file is compared with the model: two batches, and three more sizes."""
        channels, height, width = self.size
        batches = (1, self.example()[0] + 1) if self.dynamic_batch else (self.batch, self.batch)
        shapes: list[tuple[int, ...]] = [(batch, channels, height, width) for batch in batches]
        if self.dynamic_size:
            sizes = ((height + 64, width), (height // 2 + 5, width + 37), (height * 3 // 4, width * 3 // 4))
            shapes += [(batches[0], channels, *size) for size in sizes]
        return shapes

    def images(self) -> list[Tensor]:
        """Return random images of the shapes `to_check`, always the same."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator) for shape in self.to_check()]

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Axes of the input [B, C, H, W] that are dynamic, and their names."""
        return {axis: name for axis, name in AXES.items() if (self.dynamic_size if axis else self.dynamic_batch)}

    def __str__(self) -> str:
        sides = "any size" if self.dynamic_size else "x".join(map(str, self.size[1:]))
        return f"{'any batch' if self.dynamic_batch else f'batches of {self.batch}'}, {sides}"


@dataclass(frozen=True)
class Exported:
    """A file that was written and compared with its model.

    Attributes:
        path: of the file; ONNX beyond 2 GB has its weights beside it.
        error: largest difference of an output from the model's.
        spread: largest difference between the model's outputs for two images.
        checked: shapes of the images that were compared.
        seconds: that tracing and writing took.
    """

    path: Path
    error: float
    spread: float
    checked: list[tuple[int, ...]]
    seconds: float

    @property
    def megabytes(self) -> float:
        """Size of the file with its weights."""
        return sum(file.stat().st_size for file in self.path.parent.glob(f"{self.path.name}*")) / 1e6

    def __str__(self) -> str:
        where = ", ".join("x".join(map(str, shape)) for shape in dict.fromkeys(self.checked))
        return (
            f"{self.path} ({self.megabytes:.1f} MB, {self.seconds:.0f} s): largest error {self.error:.1e} of outputs "
            f"that differ by {self.spread:.2g} from image to image, at {where}"
        )


@dataclass(frozen=True)
class Reference:
    """Images of a shape and what the model made of them."""

    images: list[Tensor]
    outputs: list[list[Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, shape: Shape) -> Reference:
        """Run a model, in eval mode and on its device."""
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        images = [image.to(device) for image in shape.images()]
        return cls(images, [tree_leaves(model(image)) for image in images])

    @property
    def scale(self) -> float:
        """The largest output."""
        return max(float(t.abs().max()) for outputs in self.outputs for t in outputs)

    @property
    def spread(self) -> float:
        """Largest difference between the outputs for two images: what an error is to be measured by."""
        first, second = ([t[0] for t in outputs] for outputs in self.outputs[:2])
        return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))

    def error_of(self, run: Callable[[Tensor], list[Tensor]]) -> float:
        """Return the largest error of an output of `run`; NaN where one has NaNs.

        Raises:
            ValueError: if number or shape of the outputs differ.
        """
        errors = []
        for image, expected in zip(self.images, self.outputs, strict=True):
            found = run(image)
            if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in expected]:
                raise ValueError(
                    f"for an input {tuple(image.shape)} the outputs are {[tuple(t.shape) for t in found]}, the model's "
                    f"{[tuple(t.shape) for t in expected]}"
                )
            errors += [
                (own.to(theirs.device) - theirs).abs().max() for own, theirs in zip(found, expected, strict=True)
            ]
        return float(torch.stack(errors).max())  # NaN if there is any

    @torch.no_grad()
    def response(self, model: nn.Module) -> float:
        """Return by how much a model changes its largest output where images change by `NOISE`, in eight draws."""
        generator = torch.Generator().manual_seed(1)

        def run(image: Tensor) -> list[Tensor]:
            return tree_leaves(model(image + NOISE * torch.randn(image.shape, generator=generator).to(image)))

        return max(self.error_of(run) for _ in range(8))


def export(
    model: nn.Module,
    path: Path,
    format: str,
    shape: Shape,
    reference: Reference,
    *,
    input_name: str = "image",
    output_names: Sequence[str] = ("logits",),
    opset: int | None = None,
) -> Exported:
    """Write a model in a format of `FORMATS`; the file appears once it was compared with the model.

    Args:
        model: in eval mode, fused or not, from images [B, C, H, W] to tensors.
        path: of the file, with the format's suffix.
        format: "pt2", "onnx" or "aoti".
        shape: of its input.
        reference: what the file is compared with; of the model itself, or before it was fused.
        input_name: of the input, in ONNX.
        output_names: of the outputs, in ONNX.
        opset: of ONNX; None leaves it to torch.

    Raises:
        UserError: the model cannot be exported so, or the file does not do what the model does.
    """
    if str(path).encode(errors="replace") != os.fsencode(path):  # torch would abort
        raise UserError(f"the name {path} is not UTF-8, which ONNX and torch's files need; name another --output")
    example = reference.images[0].new_zeros(shape.example())
    make_folder(path.parent)
    start = time.perf_counter()
    with _temporary_folder(path.parent) as folder, _quiet():
        temporary = Path(folder) / path.name
        try:
            FORMATS[format].write(model, temporary, example, shape, input_name, list(output_names), opset)
        except UserError:
            raise
        except OSError as failure:
            if failure.errno is None:
                raise UserError(f"cannot export to {format} for {shape}: {_reason(failure)}") from failure
            raise UserError(f"cannot write {path}: {failure.strerror}") from failure
        except Exception as failure:  # torch's exporters raise whatever they stumble over
            raise UserError(f"cannot export to {format} for {shape}: {_reason(failure)}") from failure
        seconds = time.perf_counter() - start
        try:
            error = reference.error_of(FORMATS[format].load(temporary))
        except Exception as failure:
            text = f"exported to {format} for {shape}, but the file does not run: {_reason(failure)}"
            raise UserError(text) from failure
        spread = reference.spread
        limit = min(TOLERANCE * max(1.0, reference.scale), SHARE * spread)
        if holds_integers(model) and not error < limit:
            # a number that another order of sums rounds to another level moves outputs by steps, as slight noise does
            limit = min(max(limit, reference.response(model)), spread / 2)
        if not error < limit:
            raise UserError(
                f"exported to {format} for {shape}, but its outputs differ by {error:.1e} from the model's, which are "
                f"up to {reference.scale:.3g} and differ by {spread:.2g} from image to image; nothing was written"
            )
        try:
            for file in sorted(Path(folder).iterdir(), reverse=True):  # weights first
                os.replace(file, path.with_name(file.name))
        except OSError as failure:
            raise UserError(f"cannot write {path}: {failure.strerror}") from failure
    return Exported(path, error, spread, [tuple(image.shape) for image in reference.images], seconds)


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[str]:
    """Make a folder that is gone afterwards, also where a signal ends the process, which leaves by SystemExit then."""
    in_main = threading.current_thread() is threading.main_thread()  # Python lets no other thread set handlers
    ending = [number for number in SIGNALS if in_main and signal.getsignal(number) == signal.SIG_DFL]
    try:
        folder = TemporaryDirectory(dir=parent, prefix=".export-", ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror}") from error
    with folder as path:
        for number in ending:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        try:
            yield path
        finally:
            for number in ending:
                signal.signal(number, signal.SIG_DFL)


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
                verbose=False,
                input_names=[input_name],
                output_names=output_names,
                dynamic_shapes=(shape.dynamic_axes,),
                **options,
            )
    except Exception as error:
        if "op='visionzoo." in (text := _last_words(error)):
            raise UserError(_OWN_OPERATORS.format(text)) from error
        raise
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise UserError(
            f"--opset {opset}: torch {torch.__version__} writes this model in opset {written} and cannot turn it into "
            f"{opset}; leave --opset out, or convert the file by onnx.version_converter"
        )
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


@contextmanager
def _quiet():
    """Keep what torch's exporters tell their own developers from the user."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _last_words(error: BaseException) -> str:
    """Return what the innermost cause of an error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in _last_words(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}"
