"""Where "auto" takes torch's operation in place of Triton's kernels: on maps so small that launching takes the time.

The rule is a table of measurements, `small_maps.csv`, which `visionzoo benchmark small --table` writes: for a GPU, an
operation, with or without backward pass, and a dtype, the numbers of a map up to which torch's operation took less
time than Triton's kernels while it left the GPU idle. GPUs and operations that have no row go to Triton's kernels.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLE = Path(__file__).with_suffix(".csv")
ENVIRONMENT_VARIABLE = "VISIONZOO_SMALL_MAPS"
FORWARD, BOTH = "forward", "forward+backward"
_ALIKE = {"bfloat16": ("float16",)}  # the host launches the same for either, and only one is measured

_recorded: ContextVar[bool] = ContextVar("visionzoo_recorded", default=False)
_measured: ContextVar[bool] = ContextVar("visionzoo_measured", default=False)


class Limit(NamedTuple):
    """A row of the table.

    Args:
        gpu: name of the GPU.
        operation: a name of `visionzoo.kernels.dispatch.OPERATIONS`.
        measure: "forward" or "forward+backward".
        dtype: of the maps, such as "bfloat16", which holds for float16 too.
        numbers: B·H·W·C of the largest maps on which torch's operation was the faster, as on all smaller; 0 for none.
        library_us: µs of a call of torch's operation, on maps of `numbers`, or the smallest that were measured.
        triton_us: the same of Triton's kernels.
        torch: version.
        triton: version.
        visionzoo: version.
        date: of the measurement.
        command: that measured.
    """

    gpu: str
    operation: str
    measure: str
    dtype: str
    numbers: int
    library_us: float
    triton_us: float
    torch: str
    triton: str
    visionzoo: str
    date: str
    command: str


def read_table(path: Path) -> list[Limit]:
    """Read a table.

    Raises:
        ValueError: if it has other columns, or a number is none.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    if not lines or tuple(lines[0]) != Limit._fields:
        raise ValueError(
            f"{path}: expected the columns {','.join(Limit._fields)}; `visionzoo benchmark small --table` writes them"
        )
    return [_limit(path, number, line) for number, line in enumerate(lines[1:], start=2)]


def _limit(path: Path, number: int, line: list[str]) -> Limit:
    try:
        kinds = {"numbers": int, "library_us": float, "triton_us": float}
        cells: dict[str, Any] = dict(zip(Limit._fields, line, strict=True))
        return Limit(**{name: kinds.get(name, str)(cell) for name, cell in cells.items()})
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number}: {error}; `visionzoo benchmark small --table` writes it anew"
        ) from None


def why_library(operation: str, x: Tensor) -> str | None:
    """Say why torch's operation takes the place of Triton's kernels on a map like `x`, or None where it does not.

    Not while CUDA graphs are recorded (nor inside `recorded`), whose launches the host does not wait for.
    """
    if _measured.get():
        return "it is being measured"
    if not (limits := _limits(x.device)):
        return None
    measure = BOTH if x.requires_grad and torch.is_grad_enabled() else FORWARD
    limit = limits.get((operation, measure, x.dtype))
    if limit is None or x.numel() > limit or _recorded.get():
        return None
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return f"torch's operation is the faster {measure} up to {limit:,} numbers on this GPU ({_path().name})"


def summary(operation: str, device: torch.device) -> str:
    """Say up to how many numbers of a map torch's operation is taken on a device: "" where it never is."""
    found = [
        f"{numbers:,} numbers {measure} in {str(dtype).removeprefix('torch.')}"
        for (of, measure, dtype), numbers in _limits(device).items()
        if of == operation
    ]
    return f"torch's operation up to {', '.join(found)}" if found else ""


@contextmanager
def recorded() -> Iterator[None]:
    """Choose as for a CUDA graph in a `with` block: for what is recorded, and for what warms up before."""
    token = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(token)


def always(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function under which "auto" takes torch's operation where Triton's kernels could run, to measure it."""

    def call(*args: Any, **arguments: Any) -> Any:
        token = _measured.set(True)
        try:
            return function(*args, **arguments)
        finally:
            _measured.reset(token)

    return call


def forget() -> None:
    """Read the table anew at the next call."""
    _table.cache_clear()
    _on_device.clear()


_on_device: dict[tuple[str, int | None], dict[tuple[str, str, torch.dtype], int]] = {}


def _limits(device: torch.device) -> dict[tuple[str, str, torch.dtype], int]:
    """Numbers for operation, measure and dtype on a device."""
    key = device.type, device.index
    if key not in _on_device:
        rows = _table()
        name = device_name(device) if rows else ""
        limits = {}
        for row in rows:
            if row.gpu == name and row.numbers:
                for dtype in (row.dtype, *_ALIKE.get(row.dtype, ())):
                    limits[row.operation, row.measure, getattr(torch, dtype)] = row.numbers
        _on_device[key] = limits
    return _on_device[key]


@lru_cache(maxsize=1)
def _table() -> list[Limit]:
    path = _path()
    return read_table(path) if path.name else []


def _path() -> Path:
    return Path(os.environ.get(ENVIRONMENT_VARIABLE, TABLE))


def device_name(device: torch.device) -> str:
    """Name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
