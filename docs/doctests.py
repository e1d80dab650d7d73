"""An extension of mkdocstrings: doctests at the end of a docstring are shown as examples, not as quotations."""

import re
from typing import Any

from griffe import Extension

DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.M)


class Examples(Extension):
    """Put doctests into a section of their own."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, class or function."""
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = as_examples(obj.docstring.value)


def as_examples(text: str) -> str:
    r"""Indent each doctest under a heading.

    >>> print(as_examples("Double.\n\n>>> double(1)\n2"))
    Double.
    <BLANKLINE>
    Examples:
        >>> double(1)
        2
    """
    return DOCTEST.sub(lambda match: "Examples:\n" + re.sub(r"^", "    ", match[0], flags=re.M), text)
