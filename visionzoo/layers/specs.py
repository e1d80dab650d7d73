"""How layers are asked for: `"name"` or `dict(type="name", **options)`, one grammar for mixers, gates and alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, get_type_hints

from visionzoo.former_names import former_names
from visionzoo.layers.arguments import expected, fits
from visionzoo.text import did_you_mean, some

SHOWN = 6  # names in a message
Spec = str | Mapping[str, Any]  # a name, or dict(type=name, **options)


def read_spec(kind: str, spec: Any, table: Mapping[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
    """Return a spec as `{"type": name, **options}`.

    Args:
        kind: what the table holds, for messages: "mixer", "gate".
        spec: a name of the table or `dict(type=name, **options)`.
        table: name -> constructor.
        others: names beside those of the table.

    Raises:
        ValueError: if it is neither, or the name is unknown.
    """
    if not isinstance(spec, str | Mapping):
        raise ValueError(f"{kind}: expected a name or dict(type=name, **options), got {spec!r}")
    options: dict[str, Any] = {"type": spec} if isinstance(spec, str) else {"type": None, **spec}
    name = options["type"]
    if not isinstance(name, str) or (name not in table and name not in others):
        names = sorted({*table, *others})
        lister = f" (`visionzoo parts {kind}s` lists them)" if len(names) > SHOWN else ""
        raise ValueError(
            f"unknown {kind} {name!r}{did_you_mean(name, names)}; expected one of {some(names, SHOWN)}{lister}, or "
            "dict(type=name, **options)"
        )
    return options


def build_spec(kind: str, spec: Any, table: Mapping[str, Callable[..., Any]], *args: Any, **defaults: Any) -> Any:
    """Build what a spec asks for: `table[name](*args, **{**defaults, **options})`.

    Options must be parameters of the constructor and of the type that it states; a list stands for a tuple.

    Args:
        kind: what the table holds, for messages.
        spec: as `read_spec` takes it.
        table: name -> constructor.
        args: leading arguments, which no option may name.
        defaults: options where the spec gives none.

    Raises:
        ValueError: if the name or an option is unknown, an option has another type, or one is missing.
    """
    options = {**defaults, **read_spec(kind, spec, table)}
    name = options.pop("type")
    constructor = table[name]
    now = former_names(constructor)
    options = {key if now.get(key) in options else now.get(key, key): value for key, value in options.items()}
    parameters = list(signature(constructor).parameters.values())[len(args) :]
    takes = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    called: Any = constructor
    hints = get_type_hints(getattr(called, "__init__") if isinstance(called, type) else called)  # noqa: B009  mypy
    for key, value in options.items():
        if key not in takes:
            raise ValueError(
                f"{kind} {name!r} does not take these options: {key}={value!r}{did_you_mean(key, takes)}; "
                f"it takes {', '.join(takes) or 'none'}"
            )
        if key in hints and not fits(value, hints[key]):  # many would be met by the first image only, in torch's words
            raise ValueError(f"{kind} {name!r}: {key} must be {expected(value, hints[key])}, got {key}={value!r}")
    if missing := [p.name for p in takes.values() if p.default is Parameter.empty and p.name not in options]:
        raise ValueError(f"{kind} {name!r} needs {', '.join(missing)}: pass dict(type={name!r}, {missing[0]}=...)")
    return constructor(*args, **{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()})


def by_part(kind: str, override: Any, parts: int, of: str = "stages") -> Sequence[Any]:
    """Return an entry for each part of a model: the one for all, or a sequence with one for each.

    Args:
        kind: name of the argument, for messages: "mixers", "gates".
        override: None or a spec for all parts, or a sequence with an entry a part.
        parts: number of parts.
        of: what the model calls them.

    Raises:
        ValueError: if the number of entries is not that of the parts.
    """
    if override is None or isinstance(override, str | Mapping):
        return [override] * parts
    if not isinstance(override, Sequence) or len(override) != parts:
        raise ValueError(
            f"{kind}: expected one entry for each of the {parts} {of}, got "
            f"{len(override) if isinstance(override, Sequence) else type(override).__name__}: {override!r}"
        )
    return override


def in_turn(kind: str, entry: Any) -> list[Any]:
    """Return what the blocks of a part take in turn: the one spec of its entry, or those of a sequence.

    Raises:
        ValueError: if it is neither, or an empty sequence.
    """
    if entry is None or isinstance(entry, str | Mapping):
        return [entry]
    if not isinstance(entry, Sequence) or not entry:
        raise ValueError(f"{kind}: a stage needs at least one {kind.removesuffix('s')}, got {entry!r}")
    return list(entry)
