"""Command line and YAML: the file gives defaults, flags win, and neither may hold a name that does not exist."""

import argparse
import ast
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from visionzoo.engine.configs import find_config, shipped_configs
from visionzoo.engine.errors import UserError, closest, require

# Keys that timm's train script has or had, and writes into its args.yaml, and that this one has no flag for.
ALIASES = {"data": "data_dir", "drop_connect": "drop_path", "native_amp": "amp"}
WITHOUT_EFFECT = """
    amp_impl config device_modules distributed fuser local_rank no_prefetcher patience_epochs prefetcher rank
    save_images synchronize_step use_multi_epochs_loader worker_seeding world_size
    naflex_loss_scale naflex_max_seq_len naflex_patch_size_probs naflex_patch_sizes naflex_patchify_channels_first
    naflex_train_seq_lens train_batch_sizes train_size_probs train_size_random_mix train_size_schedule
    train_size_schedule_spread
"""
OFF: dict[str, tuple[Any, ...]] = {  # with the values at which they do nothing, beside null
    **dict.fromkeys(("apex_amp", "fast_norm", "jsd_loss", "model_ema_force_cpu", "naflex_loader"), (False,)),
    **dict.fromkeys(("resplit", "split_bn", "torchscript", "aug_splits", "tta"), (False, 0)),
    **dict.fromkeys(("head_init_bias", "head_init_scale", "model_dtype", "train_batches_per_epoch"), ()),
    "train_img_sizes": (),
    "variable_batch_loss_scale": ("none",),
}


class Number:
    """A type of numbers in a range, for argparse; it is neither NaN nor infinite.

    Args:
        kind: int or float.
        low, high: the range, ends included.
        above, below: the same, ends excluded.
    """

    def __init__(
        self,
        kind: type,
        *,
        low: float | None = None,
        high: float | None = None,
        above: float | None = None,
        below: float | None = None,
    ) -> None:
        self.__name__ = kind.__name__  # argparse's messages take it from here
        self._kind = kind
        limits = {"at least": low, "above": above, "at most": high, "below": below}
        self._limits = {words: limit for words, limit in limits.items() if limit is not None}

    def __call__(self, text: str) -> Any:
        """Return the number that `text` stands for; raises ValueError where it is none."""
        value = self._kind(text)
        holds = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
        if not (math.isfinite(value) and all(holds[words](value, limit) for words, limit in self._limits.items())):
            expected = " and ".join(f"{words} {limit}" for words, limit in self._limits.items())
            raise argparse.ArgumentTypeError(f"expected a number {expected}, got {text}")
        return value


class KeyValues(argparse.Action):
    """`key=value ...` on the command line; values are Python literals where they parse as such, else strings."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the pairs as a dict."""
        setattr(namespace, self.dest, key_values(values, str(option_string)))


def key_values(texts: Sequence[str], where: str) -> dict[str, Any]:
    """Return `key=value` texts as a dict.

    Raises:
        UserError: one is not of that form; it names `where` they stand.
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise UserError(f"{where}: expected key=value, got {text!r}")
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[key] = value
    return pairs


class Specs(argparse.Action):
    """Parts with options, each `'NAME KEY=VALUE ...'` or `'{type: NAME, KEY: VALUE, ...}'`; in YAML mappings too."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store a dict with `type` and the options for each."""
        setattr(namespace, self.dest, [read_part(text, str(option_string)) for text in values])


def read_part(entry: Any, where: str) -> dict[str, Any]:
    """Return a part with options, as text or as a mapping, as a dict whose `type` is its name.

    Raises:
        UserError: it is neither; it names `where` it stands.
    """
    part = entry
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        yaml = require("yaml")
        try:
            part = yaml.safe_load(entry)
        except yaml.YAMLError as error:
            raise UserError(f"{where}: {entry!r} is not a mapping: {error}") from error
    elif isinstance(entry, str):
        name, *options = entry.split() or [""]
        part = {"type": name, **key_values(options, f"{where} {entry!r}")}
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str) or not part["type"]:
        raise UserError(f"{where}: expected 'NAME KEY=VALUE ...' or '{{type: NAME, KEY: VALUE}}', got {entry!r}")
    return dict(part)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = isinstance(action.default, (int, float, str, list)) and action.default not in (False, "", [])
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors with the closest valid flag."""

    def __init__(self, usage: str, description: str) -> None:
        super().__init__(usage=usage, description=description, allow_abbrev=False, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below a page of usage."""
        raise UserError(f"{message} (--help lists all flags)")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse `argv` (default: sys.argv); raises UserError on an unknown flag."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].split("=")[0]
            near = closest(name, flags if name.startswith("-") else shipped_configs())
            raise UserError(f"unknown argument {name}{near} (--help lists all flags)")
        return args

    def parse_with_config(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse `argv` over the YAML it names (positionally or by -c / --config), a file or one of ours.

        Raises:
            UserError: a flag or a key that does not exist, a value of the wrong type, an unreadable file.
        """
        first = self.parse(argv)
        if first.config and first.config_file:
            raise UserError(f"two configs: {first.config_file} and --config {first.config}; give one")
        path = first.config or first.config_file
        if path:
            found = find_config(path)
            if found.suffix == ".py":
                raise UserError(
                    f"{path}: expected a .yaml config of classification, got one of OpenMMLab; train, eval, predict "
                    f"and export take it as their first argument"
                )
            self.set_defaults(**self.read_config(found))
        args = self.parse(argv)
        args.config = str(path) if path else None
        del args.config_file
        return args

    def read_config(self, path: str | Path) -> dict[str, Any]:
        """Read a YAML mapping of flag names (`-` or `_`) to values, each checked as the flag's own."""
        path = Path(path)
        if path.is_dir():
            raise UserError(f"expected a YAML file, got the folder {path}; a data set is given by --data-dir")
        yaml = require("yaml")
        try:
            text = path.read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the config {path}: {error}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {error}") from error
        if not isinstance(content, Mapping):
            raise UserError(f"{path}: expected a mapping of flag names to values, got {type(content).__name__}")
        names = [key.value for key, _ in yaml.compose(text).value]
        if twice := sorted({name for name in names if names.count(name) > 1}):  # YAML itself takes the last
            raise UserError(f"{path}: given twice: {', '.join(twice)}")
        flags = {action.dest: action for action in self._actions if action.option_strings}
        values = {}
        for key, value in content.items():
            name = str(key).replace("-", "_")
            name = ALIASES.get(name, name)
            if name in WITHOUT_EFFECT.split() or (name in OFF and value in (None, *OFF[name])):
                continue
            if name in OFF:
                raise UserError(f"{path}: {key}: {value!r} is for timm's train script, this one cannot do it")
            if name not in flags or name == "help":
                raise UserError(f"{path}: unknown key {key!r}{closest(name, flags)}")
            if value is not None:  # `key: null` keeps the default, as in the args.yaml that timm writes
                values[name] = _typed(flags[name], value, where=f"{path}: {key}")
        return values


def _typed(action: argparse.Action, value: Any, where: str) -> Any:
    """Return a YAML value as the command line would have given it."""
    if isinstance(action, KeyValues):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, got {value!r}")
        return dict(value)
    if isinstance(action, Specs):
        return [read_part(item, where) for item in (value if isinstance(value, list) else [value])]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where}: expected true or false, got {value!r}")
        return value
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            raise UserError(f"{where}: expected {action.nargs} values, got {value!r}")
        return [_single(action, item, where) for item in values]
    return _single(action, value, where)


def _single(action: argparse.Action, value: Any, where: str) -> Any:
    kind: Any = action.type or str
    if isinstance(value, (bool, list, dict)):
        raise UserError(f"{where}: expected {kind.__name__}, got {value!r}")
    try:
        value = kind(str(value))  # through text, as on the command line: YAML reads 1e-3 as a string
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where}: {error}") from None
    except ValueError:
        raise UserError(f"{where}: expected {kind.__name__}, got {value!r}") from None
    if action.choices is not None and value not in action.choices:
        raise UserError(f"{where}: expected one of {', '.join(map(str, action.choices))}, got {value!r}")
    return value
