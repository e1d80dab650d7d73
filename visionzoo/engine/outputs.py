"""Names and tables of what the tools write: nothing that is there is replaced unless it was asked for again."""

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from visionzoo.engine.checkpoints import make_folder
from visionzoo.engine.errors import UserError, printable


def free_path(path: Path, taken: Collection[Path] = (), *, own: Collection[Path] = ()) -> Path:
    """Return `path`, or its name with the first number at which nothing lies.

    Args:
        path: of a file or a folder.
        taken: names that are not free, though nothing may lie there yet.
        own: names that are free, though something lies there: what is to be written anew.
    """
    for number in count():
        name = path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path
        if name not in taken and (name in own or not (name.exists() or name.is_symlink())):
            return name
    raise AssertionError


def check_table(path: Path, columns: Sequence[str]) -> None:
    """Make sure that rows of these columns can be added to a CSV file, which need not be there.

    Raises:
        UserError: it has other columns, or it cannot be read.
    """
    if not path.exists():
        return
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a byte-order mark
            found = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the table {path}: {error}") from error
    if found not in ([], list(columns)):
        raise UserError(
            f"{path} is not a table for such rows: expected the columns {', '.join(columns)}; its first line is "
            f"{printable(', '.join(found))[:200]}. Name another file"
        )


def add_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, which is made with a header where there is none; a last line without an end gets one.

    Raises:
        UserError: as `check_table`, or it cannot be written.
    """
    check_table(path, columns)
    make_folder(path.parent)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    try:
        before = path.read_bytes() if path.exists() else b""
        if not before.removeprefix(b"\xef\xbb\xbf"):
            writer.writeheader()
        elif not before.endswith((b"\n", b"\r")):
            text.write("\n")
        writer.writerows(rows)
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
