"""What messages and reports are made of: counts, shortened lists, the nearest name, Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


def count_of(number: Any, noun: str, plural: str | None = None) -> str:
    """Return a number and its noun, in the plural but for one; `plural` where that is not the noun with s or es.

    >>> count_of(1, "image"), count_of(0, "image"), count_of(2, "class"), count_of(2, "image was", "images were")
    ('1 image', '0 images', '2 classes', '2 images were')
    """
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {plural or noun + ('es' if noun.endswith(('s', 'x', 'tch', 'sh')) else 's')}"


def some(names: Iterable[Any], limit: int = 10) -> str:
    """Return the first of some names, and how many more there are.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def did_you_mean(name: Any, valid: Iterable[str]) -> str:
    """Return ` (did you mean ...?)` with the valid name nearest to `name`, or nothing where none is near.

    >>> did_you_mean("depht", ["depths", "num_heads"])
    " (did you mean 'depths'?)"
    """
    near = get_close_matches(name, list(valid), n=1) if isinstance(name, str) else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = False) -> str:
    r"""Lay rows out as a Markdown table; a bar within a cell is written as `\|`.

    Args:
        header: titles of the columns.
        rows: their cells.
        numbers: align all columns but the first to the right.

    >>> print(markdown_table(["model", "top-1"], [["`a`", 81.5]], numbers=True))
    | model | top-1 |
    | --- | ---: |
    | `a` | 81.5 |
    """
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    lines = [[str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
