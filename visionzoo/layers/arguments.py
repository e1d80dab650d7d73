"""Arguments of constructors are checked against what the signature states, before they fail deep inside."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from inspect import Parameter, signature
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from visionzoo.former_names import former_names
from visionzoo.text import did_you_mean


class Range(NamedTuple):
    """What numbers an argument may be, in words and as ends, which are included: `Annotated[int, Range("…", 1)]`."""

    text: str
    low: float
    high: float = float("inf")


Positive = Annotated[int, Range("1 or more", 1)]
Natural = Annotated[int, Range("0 or more", 0)]
Share = Annotated[float, Range("from 0 to 1", 0, 1)]


def check_arguments(cls: type, arguments: Mapping[str, Any], *, where: str = "", also: Iterable[str] = ()) -> None:
    """Check that arguments by name are those of a class, and of the types that its constructor states.

    Args:
        cls: the class.
        arguments: by name, or by a name that they had before.
        where: what messages begin with.
        also: names that are taken elsewhere, which a message lists too.

    Raises:
        TypeError: if the class has no argument of a name.
        ValueError: if a value is of another type, or out of its range.
    """
    takes, hints = _parameters(cls)
    now = former_names(cls)
    for given, value in arguments.items():
        key = now.get(given, given)
        if key not in takes:
            names = [*takes, *also]
            raise TypeError(
                f"{where}{cls.__name__} has no argument {key!r}{did_you_mean(key, names)}; it takes {', '.join(names)}"
            )
        if key in hints and not fits(value, hints[key]):
            default = takes[key].default
            remedy = "" if default in (Parameter.empty, None) else f"; leave it out for {default!r}"
            raise ValueError(
                f"{where}{cls.__name__}: {key} must be {expected(value, hints[key])}, got {key}={value!r}{remedy}"
            )


@cache
def _parameters(cls: type) -> tuple[Mapping[str, Parameter], Mapping[str, Any]]:
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            try:
                hints |= get_type_hints(vars(base)["__init__"], include_extras=True)
            except NameError:  # a type that only type checkers import
                continue
    takes = {name: p for name, p in signature(cls).parameters.items() if p.kind is not Parameter.VAR_KEYWORD}
    return takes, hints


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as plain values go; what else a hint may be fits anything."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [each for each in args[1:] if isinstance(each, Range)]
        return fits(value, args[0]) and all(each.low <= value <= each.high for each in ranges)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in args)
    if origin is Literal:
        return value in args
    if hint is None or hint is NoneType:
        return value is None
    if hint in (float, int):
        number = isinstance(value, Real if hint is float else Integral) and not isinstance(value, bool)
        return number and value == value  # not a number is none
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is tuple or origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if len(args) == 2 and args[1] is ...:
            args = (args[0],) * len(value)
        return not args or (len(value) == len(args) and all(map(fits, value, args)))
    if origin in (Sequence, Collection):
        kind = isinstance(value, origin) and not isinstance(value, str | bytes | Mapping)
        return kind and all(fits(each, args[0]) for each in value)
    return True


def expected(value: Any, hint: Any) -> str:
    """Return what was expected instead of a value that does not fit a type."""
    return "a number" if isinstance(value, float) and value != value else type_text(hint)


def type_text(hint: Any) -> str:
    """Return a type as code writes it, with its range."""
    if get_origin(hint) is Annotated:
        kind, *ranges = get_args(hint)
        return ", ".join([type_text(kind), *(each.text for each in ranges if isinstance(each, Range))])
    if get_origin(hint) in (Union, UnionType):  # Python 3.10 adds Optional where a default is None
        return " | ".join(map(type_text, get_args(hint)))
    if hint is NoneType:
        return "None"
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return text.replace("collections.abc.", "").replace("typing.", "")
