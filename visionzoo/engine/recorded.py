"""What a later command takes from a checkpoint's record of its training, and what it does not.

A checkpoint may come from anybody. Its record is taken for how the model is built and how images are prepared; the data
set that it names is taken only where the user asks for it (`--recorded-data`), and never where it is a command or an
address. Nothing else is taken: no number of processes, no device, no folder to write to, no other weights.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm

from visionzoo.engine.data import MODES
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import CROP, FILTERS, ModelConfig
from visionzoo.engine.options import changed
from visionzoo.engine.trained_flags import EvalConfig
from visionzoo.models._hub import published_by
from visionzoo.text import count_of

DATA_FLAGS = ("dataset", "data_dir", "val_data_dir", "val_split", "class_map", "input_key", "target_key")
DATA_CONFIG = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
NUMBERS = ("num_classes", "in_chans")
# More of these is no model that anybody has trained; to build it would fill the memory, or take for ever.
MOST = {"num_classes": 10**7, "in_chans": 10**4, "img_size": 2**15, "input_size": 2**15, "model_kwargs": 10**7}
SWITCHES = ("multi_label", "apply_exif_orientation")
CROPS = ("center", "squash", "border")
# Flags that say nothing of what is learned.
OF_ONE_START = {
    *("config", "device", "experiment", "log_interval", "no_resume_opt", "output", "pin_mem", "profile", "resume"),
    *(
        "max_steps",
        "start_epoch",
        "workers",
        "log_wandb",
        "wandb_project",
        "wandb_tags",
        "wandb_resume_id",
        "recovery_interval",
    ),
}
# Words of arguments that say where weights come from, or under which license they are accepted.
ELSEWHERE = {"pretrained", "checkpoint", "file", "url", "hub", "cache", "dir", "source", "load", "commercial"}


@dataclass
class Recorded:
    """The settings of a training, by what may be done with them.

    Attributes:
        model: flags that build the model: `model`, `model_kwargs`, `num_classes`, `in_chans`, `gp`, `quantize`.
        images: flags on how images are read: `input_img_mode`, `multi_label`, `apply_exif_orientation`.
        data_config: size, crop, filter and normalization of the images, in timm's names.
        data: flags that name the data set, only for `--recorded-data`.
        class_names: in the order of their numbers.
        left_out: what the record asks for and does not get, in words.
    """

    model: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    data_config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    class_names: list[str] | None = None
    left_out: list[str] = field(default_factory=list)


def read_recorded(state: Mapping[str, Any], where: str) -> Recorded:
    """Return what a checkpoint, ours or of timm's train script, says about its training; little for bare weights.

    Raises:
        UserError: the record is damaged: a setting is not of its type.
    """
    run = recorded_args(state)
    found = Recorded()
    name = run.get("model") or (state.get("arch") if run else None)
    if name is not None:
        found.model["model"] = _checked(str, name, "model", where)
    for key in NUMBERS:
        if run.get(key) is not None:
            found.model[key] = _checked(int, run[key], key, where)
    if run.get("gp") is not None:
        found.model["gp"] = _checked(str, run["gp"], "gp", where)
    if run.get("model_kwargs"):
        kwargs = _checked(dict, run["model_kwargs"], "model_kwargs", where)
        taken = {key: value for key, value in kwargs.items() if not _names_weights(key, value)}
        _check_kwargs(taken, where)
        found.model["model_kwargs"] = taken
        found.left_out += [f"model_kwargs {key!r}" for key in kwargs if key not in taken]
    if run.get("quantize"):
        found.model["quantize"] = _checked(dict, run["quantize"], "quantize", where)
    for key in SWITCHES:
        if run.get(key) is not None:
            found.images[key] = _checked(bool, run[key], key, where)
    if mode := run.get("input_img_mode"):
        if mode not in MODES:
            raise _damaged(where, "input_img_mode", mode)
        found.images["input_img_mode"] = mode
    config = state.get("data_config") or {key: run[key] for key in DATA_CONFIG if run.get(key)}
    found.data_config = check_data_config(_checked(dict, config, "data_config", where), where)
    if "input_size" not in found.data_config and run.get("img_size"):  # timm's script records only its flags
        side = _checked(int, run["img_size"], "img_size", where)
        found.data_config["input_size"] = (found.model.get("in_chans") or 3, side, side)
    found.data = {key: _checked(str, run[key], key, where) for key in DATA_FLAGS if run.get(key)}
    if (names := state.get("class_names")) is not None:
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise _damaged(where, "class_names", names)
        found.class_names = list(names)
    return found


def recorded_beside(path: str | Path) -> Recorded | None:
    """Return what the config.json says in the folder of a checkpoint, or beside its model.safetensors.

    Returns:
        None where there is none, or none of timm's.

    Raises:
        UserError: it is damaged.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    config = folder / "config.json"
    if not config.is_file() or (folder != Path(path) and Path(path).name != "model.safetensors"):
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        if "architecture" not in content:
            return None
        cfg = {**content.get("pretrained_cfg", content), **content}
        kwargs = content.get("model_args") or {}
        taken = {key: value for key, value in kwargs.items() if not _names_weights(key, value)}
        model = {"model": str(content["architecture"]), "num_classes": cfg.get("num_classes"), "model_kwargs": taken}
        said = published_by(cfg)
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"cannot read {config}: {type(error).__name__}: {error}; fix it, or move it away") from error
    if model["num_classes"] is not None:
        _checked(int, model["num_classes"], "num_classes", str(config))
    _check_kwargs(taken, str(config))
    left_out = [f"model_args {key!r}" for key in kwargs if key not in taken]
    data_config = check_data_config({key: cfg[key] for key in DATA_CONFIG if key in cfg}, str(config))
    return Recorded(model, said["reading"], data_config, class_names=said["class_names"], left_out=left_out)


def recorded_args(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of the training that wrote a checkpoint, unchecked; none for bare weights."""
    args = state.get("args") or {}
    if isinstance(args, argparse.Namespace):  # of timm's own
        return dict(vars(args))
    return dict(args) if isinstance(args, Mapping) else {}


def command_of(args: Mapping[str, Any]) -> str:
    """Return the command whose runs have these flags."""
    return "multi-task" if "decoder" in args else "train"


def compare_classes(recorded: Any, here: list[str] | None, where: str) -> None:
    """Refuse to continue from a checkpoint of other classes, or of the same ones in another order.

    Raises:
        UserError: the first class that differs is named.
    """
    if not recorded or not here or list(recorded) == here:
        return
    counts = f"{where} is of {count_of(len(recorded), 'class')}, the data set has {len(here)}"
    if len(recorded) == len(here):
        number = next(i for i, (one, other) in enumerate(zip(recorded, here, strict=True)) if one != other)
        counts = f"class number {number} is {recorded[number]!r} in {where} and {here[number]!r} in the data set"
    raise UserError(
        f"{counts}; name the folders as they were, or number them by --class-map. Another run may start from these "
        "weights by --pretrained-path"
    )


def changed_settings(state: Mapping[str, Any], args: Mapping[str, Any], data_config: Mapping[str, Any]) -> list[str]:
    """Return the settings of a run that differ from those of its checkpoint, each as `name: old -> new`."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value or None  # timm's script has None for our '' and 0

    before = {name: value for name, value in recorded_args(state).items() if name not in OF_ONE_START}
    pairs = [(name, before[name], args[name]) for name in args if name in before]
    prepared = state.get("data_config") or {}
    pairs += [(name, prepared[name], data_config[name]) for name in data_config if name in prepared]
    changed = {name: f"{name} {old!r} -> {new!r}" for name, old, new in pairs if plain(old) != plain(new)}
    return list(changed.values())


def take_model(config: ModelConfig, recorded: Recorded, where: str) -> ModelConfig:
    """Return a model with the flags that were not given filled from the record.

    Raises:
        UserError: the record names a model that would be looked up outside this installation.
    """
    run = recorded.model
    name = run.get("model")
    if config.model not in (None, name):  # the architecture of the run says nothing about this one
        return config
    if config.model is None and name is not None and not timm.is_model(name):
        raise UserError(
            f"{where} names {name!r} as its model, which is none of timm's here and is not looked up elsewhere on a "
            "file's word; name it yourself by --model"
        )
    return replace(config, **{key: value for key, value in run.items() if getattr(config, key) in (None, {})})


def take_data(config: EvalConfig, recorded: Recorded, where: str) -> EvalConfig:
    """Return an evaluation with its data set filled from the record, where `--recorded-data` asks for it.

    Raises:
        UserError: no data set is given; or the recorded one is asked for, and there is none, or it is a command or an
            address.
    """
    shown = ", ".join(f"{key}={value!r}" for key, value in recorded.data.items())
    data = config.data
    given = data.data_dir or data.dataset
    if not config.result.recorded_data:
        if not given and shown:
            raise UserError(
                f"which images? {where} was trained with {shown}; pass --recorded-data to evaluate on those, or give "
                "--data-dir or --dataset"
            )
        return config
    if given:
        raise UserError("--recorded-data together with --data-dir or --dataset; give one")
    if not shown:
        raise UserError(f"--recorded-data: {where} records no data set; give --data-dir or --dataset")
    for key, value in recorded.data.items():
        if _is_elsewhere(value) or (":" in value and recorded.data.get("dataset", "").startswith("wds")):
            flag = "--split" if key == "val_split" else f"--{key.replace('_', '-')}"
            raise UserError(
                f"--recorded-data: {where} names {key}={value!r}, a command or an address, which is never taken from a "
                f"file; give the data set yourself, by {flag} and the like"
            )
    print(f"as {where} records: {shown}")
    run = dict(recorded.data)
    found: dict[str, Any] = {"data_dir": run.pop("val_data_dir", None) or run.get("data_dir")}
    found["split"] = config.result.split or run.get("val_split", "")
    for key in ("dataset", "class_map", "input_key", "target_key"):
        found[key] = getattr(data, key) or run.get(key) or getattr(data, key)
    return changed(config, **found)


def per_channel(config: dict[str, Any]) -> dict[str, Any]:
    """Give images of other than three channels the average of three means and deviations, as timm's loader does."""
    channels = config.get("input_size", (3,))[0]
    for name in ("mean", "std"):
        if len(values := config.get(name, ())) == 3 != channels:
            config[name] = (sum(values) / 3,) * channels
    return config


def _is_elsewhere(text: str) -> bool:
    """Whether a text is a command or an address for what opens data sets, rather than a name or a path."""
    scheme = re.search(r"(^|[:{,\s])[A-Za-z][\w+.-]+:", text)  # one letter is a drive
    return bool(scheme) or "://" in text or text[:2] in ("//", r"\\")


def _names_weights(key: Any, value: Any) -> bool:
    """Whether an argument of a model, or one within it, has it read something, or is no plain value."""
    if not isinstance(key, str) or set(key.lower().split("_")) & ELSEWHERE:
        return True
    return not _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not any(_names_weights(key, inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return not _is_elsewhere(value)
    return value is None or isinstance(value, (bool, int, float))


def check_data_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return how images are prepared, as it is recorded in `where`, with a mean and a deviation for each channel.

    Raises:
        UserError: a setting is none of timm's.
    """

    def numbers(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_number, value))

    def size(value: Any) -> bool:
        within = numbers(value) and len(value) == 3 and all(isinstance(side, int) and side > 0 for side in value)
        return within and value[0] <= MOST["in_chans"] and max(value[1:]) <= MOST["input_size"]

    valid: dict[str, Callable[[Any], bool]] = {
        "input_size": size,
        "mean": numbers,
        "std": lambda value: numbers(value) and all(number > 0 for number in value),
        "crop_pct": lambda value: bool(_is_number(value) and CROP[0] <= value <= CROP[1]),
        "interpolation": lambda value: value in (*FILTERS, "random"),
        "crop_mode": lambda value: value in CROPS,
    }
    for key, is_valid in valid.items():
        if key in config and not is_valid(config[key]):
            raise _damaged(where, key, config[key])
    channels = config.get("input_size", (0,))[0]
    for key in ("mean", "std"):
        if channels and key in config and len(config[key]) not in (1, 3, channels):
            raise _damaged(where, key, config[key])
    return per_channel({key: config[key] for key in valid if key in config})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _checked(kind: Any, value: Any, key: str, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or not 0 <= value <= MOST[key])):
        raise _damaged(where, key, value)
    if kind is int and value == 0 and key != "num_classes":  # a model without a classifier has none
        raise _damaged(where, key, value)
    return value


def _check_kwargs(kwargs: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of a model with numbers, at any depth, that are no sizes."""
    waiting: list[tuple[str, Any]] = list(kwargs.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{key}.{name}", inner) for name, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(key, inner) for inner in value]
        elif isinstance(value, (int, float)) and not abs(value) <= MOST["model_kwargs"]:  # NaN is refused too
            raise _damaged(where, f"model_kwargs {key}", value)


def _damaged(where: str, key: str, value: Any) -> UserError:
    shown = repr(value)
    return UserError(
        f"{where} records {key}={shown[:80] + ' ...' if len(shown) > 80 else shown}, which is not a valid setting; its "
        "record is damaged. Its bare weights (its state_dict, saved by itself) can be used with --model"
    )
