"""Files of names, one a line: class maps, and names of classes."""

from pathlib import Path

from visionzoo.engine.errors import UserError
from visionzoo.text import some


def read_class_map(path: str, root: str | None) -> dict[str, int]:
    """Return the numbers of the classes that a text file names, one a line.

    Raises:
        UserError: as `read_names`; or a class is named twice, and would have two numbers.
    """
    within = Path(root or "", path)
    file = within if within.exists() and not Path(path).exists() else Path(path)
    names = read_names(file, "class map")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{file} names {some(twice)} twice; each class has one number")
    return {name: number for number, name in enumerate(names)}


def read_names(path: Path, what: str) -> list[str]:
    """Return the names in a text file, one a line; empty lines at its end do not count.

    Raises:
        UserError: it cannot be read as UTF-8, it is empty, or an empty line would have a number too.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors may begin it with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {what} {path}: {error}") from error
    names = [line.strip() for line in text.rstrip().split("\n")]
    if "" in names:
        empty = "it is empty" if len(names) == 1 else f"its line {names.index('') + 1} is empty"
        raise UserError(f"cannot use the {what} {path}: {empty}, and would be a class without a name; remove it")
    return names
