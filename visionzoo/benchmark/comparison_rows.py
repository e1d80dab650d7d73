"""Results of a comparison as CSV: a row for each run, speed or mixer, which a later start reads and continues."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionzoo.engine.checkpoints import write_atomically
from visionzoo.engine.errors import UserError
from visionzoo.text import count_of

_DAMAGED = "fix the line, or remove it to have it done again"
WORDS = {
    "model",
    "host",
    "mixer",
    "spec",
    "status",
    "reason",
    "stops",
    "device",
    "torch",
    "timm",
    "visionzoo",
    "python",
}
NUMBERS = {  # columns of numbers; what others add may be anything
    "seed",
    "params_m",
    "trained_m",
    "top1",
    "seconds",
    "epochs",
    "train_images_per_second",
    "loader_images_per_second",
    "inference_images_per_second",
    "peak_memory_mib",
    "time_exponent",
    "memory_exponent",
    "stops_at",
}
OF_RUNS = ("params_m", "top1", "epochs", "device", "torch", "timm", "python")  # what the row of a run that is done has

Row = dict[str, Any]


def read_rows(path: Path, key: str = "model", needed: Sequence[str] = ()) -> list[Row]:
    """Read results; an empty list where there are none.

    Args:
        path: of the CSV.
        key: the column that says what a row is of.
        needed: columns that a row whose status is "ok" has filled.

    Raises:
        UserError: they are damaged: cut off, not in the columns that their first line names, or these lack or hold
            something else than they must.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets write a mark at the beginning
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}; {_DAMAGED}") from error
    if not text:
        return []
    names, *cells = lines
    if not text.endswith("\n"):
        raise UserError(f"{path} is cut off in line {len(lines)}; {_DAMAGED}")
    rows: list[Row] = []
    for number, values in enumerate(cells, 2):
        if len(values) != len(names):
            raise UserError(
                f"{path}, line {number}: expected {count_of(len(names), 'cell')}, got {len(values)}; {_DAMAGED}"
            )
        row = {n: text if n in WORDS else _number(text) for n, text in zip(names, values, strict=True)}
        if not row.get(key) or not isinstance(row.get("seed", 0.0), float | int):
            raise UserError(f"{path}, line {number}: expected a {key} and its seed, got {row}; {_DAMAGED}")
        for name in NUMBERS & row.keys():
            if isinstance(row[name], str):
                raise UserError(f"{path}, line {number}: {name} must be a number, got {row[name]!r}; {_DAMAGED}")
        if (status := row.get("status", "ok")) not in ("ok", "failed"):
            raise UserError(f"{path}, line {number}: status must be ok or failed, got {status!r}; {_DAMAGED}")
        if status == "ok" and (empty := [name for name in needed if row.get(name) in (None, "")]):
            raise UserError(f"{path}, line {number}: nothing for {', '.join(empty)}; {_DAMAGED}")
        rows.append(row)
    return rows


def _number(text: str) -> Any:
    try:
        return float(text) if text else None
    except ValueError:
        return text


def write_rows(rows: list[Row], path: Path) -> None:
    """Write results; columns are those of all rows."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)  # earlier versions wrote fewer
    writer = csv.DictWriter(text, list(names))
    writer.writeheader()
    writer.writerows([{name: f"{x:.7g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
