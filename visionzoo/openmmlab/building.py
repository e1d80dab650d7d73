"""What a config has in the wrong place, or what cannot be built of it, is told by its place and its values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from visionzoo.engine.errors import UserError, closest


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Put the pairs of --cfg-options into a config.

    Raises:
        UserError: if one has no place in it, or would put a single value where a part with keys is.
    """
    for key, value in options.items():
        there = dict(_parts(cfg)).get(key)
        if there and not isinstance(value, Mapping | list | tuple | None):
            raise UserError(f"--cfg-options {key}: expected a part with keys such as {', '.join(there)}, got {value!r}")
        try:
            cfg.merge_from_dict({key: value})
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"--cfg-options {key}={value}: the config has no such place: {_said(error)}") from error


def build(cfg: Config, step: Callable[[], Any]) -> Any:
    """Return what `step` does; mmengine builds some parts of a config when they are first needed.

    Raises:
        UserError: if a part cannot be built; with its place in the config, its values, and where that was noticed.
    """
    try:
        return step()
    except UserError:
        raise
    except Exception as error:
        frames = [*walk_tb(error.__traceback__)]
        parts = [part for frame, _ in frames if (part := _being_built(frame)) is not None]
        if parts:
            raise UserError(_told(cfg, parts[-1], error, *frames[-1])) from error
        if any(frame.f_code is Runner.from_cfg.__func__.__code__ for frame, _ in frames):  # type: ignore[attr-defined]
            raise UserError(f"the config makes no training or evaluation: {_said(error)}") from error
        raise


def _told(cfg: Config, part: Mapping[str, Any], error: Exception, noticed: FrameType, line: int) -> str:
    # what is built may have got more values on the way
    places = [
        (len(own), place, own)
        for place, own in _parts(cfg)
        if own and all(key in part and part[key] == value for key, value in own.items())
    ]
    _, place, own = max(places, key=itemgetter(0), default=(0, part.get("type", "a part"), part))
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    hint = closest(unknown[1], own.keys() - {unknown[1]}) if unknown else ""
    values = (
        f"{key}={shown if len(shown := repr(value)) <= 100 else '...'}"
        for key, value in own.items()
        if key != "_scope_"
    )
    return (
        f"{place} of the config cannot be built: {_said(error)}{hint} ({type(error).__name__} in "
        f"{Path(noticed.f_code.co_filename).name}, line {line}). Its values: {', '.join(values)}"
    )


def _being_built(frame: FrameType) -> Mapping[str, Any] | None:
    """Return the part of a config that a function of mmengine builds, if it is one that builds."""
    code = frame.f_code
    if not (code.co_name.startswith("build") and frame.f_globals.get("__name__", "").startswith("mmengine.")):
        return None
    arguments = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
    return next((argument for argument in arguments if isinstance(argument, Mapping)), None)


def _parts(node: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return everything with keys in a config, and its place as --cfg-options would write it."""
    entries: Any = enumerate(node) if isinstance(node, list | tuple) else getattr(node, "items", tuple)()
    if place and isinstance(node, Mapping):
        yield place, node
    for key, value in entries:
        yield from _parts(value, f"{place}.{key}" if place else str(key))


def _said(error: Exception) -> str:
    return str(error.args[0] if error.args else error)  # a KeyError's own text is in quotes
