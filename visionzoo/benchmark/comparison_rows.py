"""Results of a comparison as CSV: a row for each run, speed or mixer, which a later start reads and continues."""

from __future__ import annotations

import csv
import io
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

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read results; an empty list where there are none.

    Raises:
        UserError: they are damaged: cut off, or not in the columns that their first line names.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode()
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
        if not (row.get("model") or row.get("mixer")) or not isinstance(row.get("seed", 0.0), float | int):
            raise UserError(f"{path}, line {number}: expected a model and its seed, or a mixer, got {row}; {_DAMAGED}")
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
