"""What a config has in the wrong place, or what cannot be built of it, is reported by its place and its values."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from visionzoo.engine.errors import Interrupted, UserError, closest
from visionzoo.text import some


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Put the pairs of --cfg-options into a config.

    Raises:
        UserError: if one has no place in it, or would put a single value where a part with keys is.
    """
    for key, value in options.items():
        _check_read(cfg, key)
        there = dict(_parts(cfg)).get(key)
        if there and not isinstance(value, Mapping | list | tuple | None):
            raise UserError(f"--cfg-options {key}: expected a part with keys such as {', '.join(there)}, got {value!r}")
        try:
            cfg.merge_from_dict({key: value})
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"--cfg-options {key}={value}: the config has no such place: {_said(error)}") from error


def unmerged(error: TypeError) -> str | None:
    """Say which part of a config file has no part to be merged with in its base, if that is what stopped mmengine."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    merging = [frame.f_locals for frame in frames if frame.f_code is Config._merge_a_into_b.__code__]
    if not merging:
        return None
    files = [frame.f_locals["filename"] for frame in frames if frame.f_code is Config._file2dict.__code__]
    place, last = ".".join(str(scope["k"]) for scope in merging), merging[-1]
    there = last["b"][last["k"]]
    kind = "a list" if isinstance(there, list | tuple) else repr(there)
    return (
        f"{files[-1]} cannot be read: {place} is a part with keys such as {some(last['v'], 4)}, where its _base_ has "
        f"{kind}; write {'a list' if kind == 'a list' else 'a value'}, or add _delete_=True to the part to replace "
        "what the base has"
    )


def _check_read(cfg: Config, key: str) -> None:
    """Refuse a key that nothing reads: a helper variable of a config file, or a name that no source of OpenMMLab has.

    Raises:
        UserError: it is none; with the closest that is.
    """
    first, *rest = key.split(".")
    known = {*cfg, *inspect.signature(Runner).parameters}
    if first not in known and (meant := closest(first, known)):
        raise UserError(f"--cfg-options {first}: there is no such part of the config{meant}")
    name = key.rpartition(".")[2]
    if first not in READ and first not in _names_of_sources(cfg, ()):
        raise UserError(
            f"--cfg-options {key}: nothing reads it, it is only a variable of the config file{_meant(cfg, first, name)}"
        )
    place = key.rpartition(".")[0]
    inside: Mapping[str, Any] = dict(_parts(cfg)).get(place, {})
    if rest and name not in inside and _is_unread(place, inside, name, _names_of_sources(cfg)):
        near = _near(name, inside, _names_of_sources(cfg))
        raise UserError(f"--cfg-options {key}: nothing reads {name!r}{near}")


def unread(cfg: Config) -> list[str]:
    """Name what a config file sets and nothing reads: variables of its own, and keys that no source of OpenMMLab has.

    OpenMMLab's own configs have some, such as settings of its earlier versions, so that it is not an error.
    """
    notes = [
        f"{cfg.filename}: nothing reads {name}, it is only a variable of this file{_meant(cfg, name, name)}"
        for name in _unread_variables(cfg)
    ]
    sources = _names_of_sources(cfg)
    for place, part in _parts(cfg):
        if _READ_INSIDE & {*place.split(".")}:
            wrong = [name for name in part if _is_unread(place, part, name, sources)]
            notes += [f"{cfg.filename}: nothing reads {place}.{name}{_near(name, part, sources)}" for name in wrong]
    return notes


# parts that OpenMMLab reads itself; others may be handed on whole, to detectron2 or diffusers
_READ_INSIDE = {
    "auto_scale_lr", "data_prefix", "env_cfg", "filter_cfg", "paramwise_cfg", "test_cfg", "train_cfg", "val_cfg",
}  # fmt: skip


def _meant(cfg: Config, variable: str, name: str) -> str:
    """Say which flag, or which places of the config, have the name of a variable that nothing reads."""
    paths = [*dict.fromkeys(f"{place}.{leaf}" for place, part in _parts(cfg) for leaf in part)]
    of_name = [path for path in paths if path.split(".")[0] in READ and path.endswith(f".{name}")]
    flag = {"data_root": "--data-root", "classes": "--classes"}.get(variable)
    return f"; did you mean {flag or ' or '.join(of_name[:4])}?" if flag or of_name else closest(variable, READ)


def _unread_variables(cfg: Config) -> list[str]:
    """Return the variables that a file of Python sets and neither it nor the Runner uses."""
    path = Path(cfg.filename or "")
    if path.suffix != ".py":
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    targets = [target for line in tree.body if isinstance(line, ast.Assign) for target in line.targets]
    assigned = [target.id for target in targets if isinstance(target, ast.Name)]
    inherits = "_base_" in assigned or "read_base" in used
    if not inherits and not used & {*assigned}:
        return []  # as mmengine writes it into the work folder: every variable is in its places already
    known = {*READ, "_base_"}
    return [name for name in dict.fromkeys(assigned) if name not in used | known and not name.startswith("__")]


def _is_unread(place: str, part: Mapping[str, Any], name: Any, sources: frozenset[str]) -> bool:
    """Whether no source has a key's name; parts with a type, and those called with their keys, refuse by themselves."""
    strict = place in ("randomness", "train_dataloader", "val_dataloader", "test_dataloader")
    free = {"custom_keys", "init_kwargs", "metainfo"} & {*place.split(".")}  # names of parameters, and of users' choice
    a_name = isinstance(name, str) and name.isidentifier()
    return a_name and not strict and not free and "type" not in part and name not in sources


def _near(name: str, part: Mapping[str, Any], sources: frozenset[str]) -> str:
    others = [other for other in part if isinstance(other, str) and other != name]
    return closest(name, others) or closest(name, get_close_matches(name, sources, n=2, cutoff=0.85))


READ = (
    *(name for name in inspect.signature(Runner).parameters if name != "cfg"),
    "auto_scale_lr", "compile", "custom_imports", "find_unused_parameters", "model_wrapper_cfg",
    "sync_bn", "tta_model", "tta_pipeline",
)  # fmt: skip  # what mmengine's Runner takes or asks the config for


@functools.cache
def _words(package: str) -> frozenset[str]:
    found = find_spec(package)
    places = [*(found.submodule_search_locations or [])] if found else []
    files = [file for place in places for file in Path(place).rglob("*.py") if ".mim" not in file.parts]
    if found and found.origin and not places:
        files = [Path(found.origin)]
    return frozenset(word for file in files for word in re.findall(r"[A-Za-z_]\w*", file.read_text(errors="replace")))


def _names_of_sources(
    cfg: Config, packages: Sequence[str] = ("mmengine", "mmcv", "mmdet", "mmseg", "visionzoo", "torch.optim")
) -> frozenset[str]:
    """Return every name in packages, and in those that a config imports; nothing can read what is not among them."""
    own = (cfg.get("custom_imports") or {}).get("imports") or []
    imported = {name.partition(".")[0] for name in ([own] if isinstance(own, str) else own)}
    return frozenset().union(*map(_words, {*packages, *(imported - {"mmdet", "mmseg", "visionzoo"})}))


def build(cfg: Config, step: Callable[[], Any]) -> Any:
    """Return what `step` does; mmengine builds some parts of a config when they are first needed.

    Raises:
        UserError: if a part cannot be built; with its place in the config, its values, and where that was noticed.
    """
    try:
        return step()
    except (UserError, Interrupted):
        raise
    except Exception as error:
        if str(error).startswith("Expected more than 1 value per channel when training"):
            raise UserError(
                "a batch norm got one value per channel, which has no deviation: a head such as UPerNet's pools a "
                "map to 1x1. Set train_dataloader.batch_size=2 or more (and train_dataloader.drop_last=True if one "
                "image is left over), or another norm, such as norm_cfg of type GN"
            ) from error
        frames = [*walk_tb(error.__traceback__)]
        parts = [part for frame, _ in frames if (part := _being_built(frame)) is not None]
        if parts:
            raise UserError(_told(cfg, parts[-1], error, *frames[-1])) from error
        if any(frame.f_code is Runner.from_cfg.__func__.__code__ for frame, _ in frames):  # type: ignore[attr-defined]
            raise UserError(f"the config describes no training or evaluation: {_said(error)}") from error
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
