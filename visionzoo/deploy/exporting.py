"""One model to one file, which is compared with the model before it appears."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from visionzoo.deploy.checking import Reference, Shape
from visionzoo.deploy.formats import FORMATS, last_words
from visionzoo.deploy.integers import holds_integers
from visionzoo.engine.checkpoints import make_folder
from visionzoo.engine.errors import UserError
from visionzoo.engine.interruption import SIGNALS

TOLERANCE = 1e-3  # largest error of an output; of outputs beyond 1 in proportion
SHARE = 0.05  # largest error of an output over what outputs change by from image to image


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


@contextmanager
def _quiet():
    """Keep what torch's exporters tell their own developers from the user."""
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


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in last_words(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}"
