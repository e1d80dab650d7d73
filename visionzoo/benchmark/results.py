"""Rows of results, written as they come: a run that is stopped keeps what it had."""

from __future__ import annotations

import csv
import io
import platform
import re
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import visionzoo
from visionzoo.benchmark.cases import Case
from visionzoo.engine.checkpoints import write_atomically
from visionzoo.engine.errors import UserError
from visionzoo.kernels.small_maps import device_name


@dataclass
class Row:
    """One measurement, with all that is needed to read it by itself.

    Times are milliseconds, memory is MiB. `median_ms` is that of a call as one makes it, `replayed_ms` that of a CUDA
    graph of it, `busy_ms` what kernels take in a call: where the first is much longer, launching takes the time.
    `launches` counts the kernels and copies of a call. `first_call_s` is seconds until the first result, in which
    kernels are compiled that no earlier row has run.
    `status` is "ok"; "absent" (the implementation cannot take part here), "failed" or "skipped" (no time was left),
    each with its `reason`, which for "ok" is a remark. `peak_mib` is what a call takes beyond `fixed_mib`, its inputs
    and weights; `held_mib` is explained in `visionzoo.benchmark.memory`.
    `error` is relative to a reference in float64, `allowed_error` tells another function from rounding.
    """

    case: str
    implementation: str
    measure: str
    status: str = "ok"
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    replayed_ms: float | None = None
    repeats: int | None = None
    images_per_second: float | None = None
    floor_ms: float | None = None
    peak_mib: float | None = None
    fixed_mib: float | None = None
    held_mib: float | None = None
    error: float | None = None
    allowed_error: float | None = None
    reason: str = ""
    batch: int | None = None
    tokens: int | None = None
    shape: str = ""
    layout: str = ""
    dtype: str = ""
    floor_bytes: float | None = None
    floor_flops: float | None = None
    copy_gb_s: float | None = None
    matmul_tflop_s: float | None = None
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    timm: str = ""
    visionzoo: str = ""
    python: str = ""
    busy_ms: float | None = None
    first_call_s: float | None = None
    launches: float | None = None

    @property
    def busy_share(self) -> float | None:
        """Share of a call's time in which the GPU was busy; None where that was not measured."""
        return self.busy_ms / self.median_ms if self.busy_ms and self.median_ms else None

    @property
    def all_tokens(self) -> int:
        """Tokens of all maps of a call."""
        return (self.batch or 0) * (self.tokens or 0)

    @property
    def agrees(self) -> bool | None:
        """Whether it computes what it should; None where that was not measured."""
        if self.error is None or self.allowed_error is None:
            return None
        return self.error <= self.allowed_error


LATER = ("busy_ms", "first_call_s", "launches")  # columns that files of earlier versions lack
COLUMNS = [field.name for field in fields(Row)]
_NUMBERS = {
    field.name: int if "int" in str(field.type) else float for field in fields(Row) if "None" in str(field.type)
}


def folder_name(device: torch.device) -> str:
    """Name of the folder for results of a device, such as "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def environment(device: torch.device) -> dict[str, str]:
    """Say on what and with which versions a row was measured."""
    return {
        "gpu": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "visionzoo": visionzoo.__version__,
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


class Results:
    """A CSV file of rows. Those of a case all come from one run: what an earlier run left of it goes when it begins."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = read_rows(path)

    def has(self, case: Case) -> bool:
        """Whether an earlier run got to the end of a case, with all the measurements that it has now."""
        found = {
            (row.implementation, row.measure) for row in self.rows if row.case == case.name and row.status != "skipped"
        }
        return found >= {(m.implementation, m.measure) for m in case.measurements}

    def begin(self, case: str) -> None:
        """Drop what an earlier run measured of a case."""
        self.rows = [row for row in self.rows if row.case != case]

    def add(self, row: Row) -> None:
        """Append a row and write the file."""
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in self.rows)
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file, none if there is no such file.

    Raises:
        UserError: if it has other columns, or is damaged.
    """
    if not path.exists():
        return []
    text = path.read_bytes().decode(errors="replace")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if reader.fieldnames not in [COLUMNS[: len(COLUMNS) - n] for n in range(len(LATER) + 1)]:
        raise UserError(
            f"{path} has other columns than this version of visionzoo writes; move it away, or name another folder "
            "with --output"
        )
    rows, damaged = [], 0 if text.endswith("\n") else text.count("\n") + 1
    for line in reader:
        try:
            rows.append(Row(**{name: _value(name, cell) for name, cell in line.items()}))
        except (TypeError, ValueError):  # more cells, or fewer, or a word for a number
            damaged = damaged or reader.line_num
    if damaged:
        raise UserError(
            f"{path} is damaged in line {damaged}; remove the line, and measure its case again with --missing"
        )
    return rows


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(name: str, cell: Any) -> Any:
    if not isinstance(cell, str):
        raise TypeError(name)
    if name not in _NUMBERS:
        return cell
    return _NUMBERS[name](cell) if cell else None
