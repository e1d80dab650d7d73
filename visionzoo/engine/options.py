"""Command line and YAML: the file gives defaults, flags win, and neither may hold a name that does not exist.

What a command is given is a frozen dataclass. Its fields are flags (`flag`, `switch`) or further such dataclasses, each
a group of `--help` if it has a TITLE. `Parser` makes the command line from it and returns it filled. A flag's name is
unique within a command: `settings` returns all flags in one flat dict, as runs record them, and `changed` replaces any.
"""

import argparse
import ast
import dataclasses
import math
import operator
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from visionzoo.engine.configs import COMMANDS, find_config, shipped_configs, task_of
from visionzoo.engine.errors import UserError, closest, require
from visionzoo.text import count_of

OF_MODELS = ("mixers", "gates", "memory", "reduce")  # what every zoo_* model takes, which are no flags
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


C = TypeVar("C")
FLAG = "flag"  # of a field's metadata: what argparse gets


def flag(help: str, default: Any = None, *, names: Sequence[str] = (), **settings: Any) -> Any:
    """Return a field of a frozen dataclass that a flag fills: the only place where the flag is declared.

    Args:
        help: the field's meaning, with units, as `--help` shows it.
        default: where neither the command line nor a YAML gives it.
        names: on the command line; by default that of the field, with dashes. A name without dashes is positional.
        settings: of `argparse.ArgumentParser.add_argument`: `type` (a `Number` has the range), `choices`, `nargs`, ...
    """
    metadata = {FLAG: (tuple(names), {"help": help, "default": default, **settings})}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def switch(help: str, *, negatable: bool = True) -> Any:
    """Return a field for a flag that is on or off; --no-NAME turns off what a config turns on, if it is negatable."""
    return flag(help, False, action=argparse.BooleanOptionalAction if negatable else "store_true")


def add_flags(parser: Any, config: Any) -> None:
    """Add the flags of a dataclass to a parser or to a group of it."""
    for field in dataclasses.fields(config):
        if FLAG not in field.metadata:
            title = getattr(field.type, "TITLE", None)
            add_flags(parser.add_argument_group(title) if title else parser, field.type)
            continue
        names, settings = field.metadata[FLAG]
        names = names or (f"--{field.name.replace('_', '-')}",)
        if names[0].startswith("-"):
            settings = {**settings, "dest": field.name}
        else:
            settings = {name: value for name, value in settings.items() if name != "default"}
        parser.add_argument(*names, **settings)


def filled(config: type[C], values: Mapping[str, Any]) -> C:
    """Return a dataclass of flags with `values`, by the flags' names."""
    parts = {
        field.name: values[field.name] if FLAG in field.metadata else filled(field.type, values)  # type: ignore[arg-type]
        for field in dataclasses.fields(config)  # type: ignore[arg-type]
    }
    return config(**parts)


def settings(config: Any) -> dict[str, Any]:
    """Return all flags of a filled dataclass, those of its parts among them, by name: what runs record."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= {field.name: value} if FLAG in field.metadata else settings(value)
    return found


def given_flags(part: Any) -> list[str]:
    """Return the flags of a part of a command's configuration that are not as they are by default."""
    usual = settings(type(part)())
    return [f"--{name.replace('_', '-')}" for name, value in settings(part).items() if value != usual[name]]


def changed(config: C, **values: Any) -> C:
    """Return a filled dataclass with other values of some flags, whichever part they are in.

    Raises:
        TypeError: it has no such flag.
    """
    if unknown := sorted(values.keys() - settings(config).keys()):
        raise TypeError(f"{type(config).__name__} has no flags {', '.join(unknown)}")
    return filled(type(config), {**settings(config), **values})


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
    """`key=value ...` on the command line; values are Python literals or YAML's brackets, else strings."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the pairs as a dict."""
        form = "key=value" if self.metavar in (None, "K=V") else str(self.metavar)
        setattr(namespace, self.dest, key_values(values, str(option_string), form))


def key_values(texts: Sequence[str], where: str, form: str = "key=value") -> dict[str, Any]:
    """Return `key=value` texts as a dict.

    Raises:
        UserError: one is not of that form, or two have one key; it names `where` they stand, and the `form`.
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise UserError(f"{where}: expected {form}, got {text!r}")
        if key in pairs:
            raise UserError(f"{where}: {key} is given twice; keep one")
        pairs[key] = _value(value, f"{where} {text}")
    return pairs


def _value(text: str, where: str) -> Any:
    """Return a Python literal, a YAML mapping or list such as `{type: full}`, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if not text.startswith(("{", "[")):
            return text
    yaml = require("yaml")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"{where}: expected a mapping or a list in brackets; in a shell, quote what holds spaces: "
            "'KEY={type: NAME, OPTION: VALUE}'"
        ) from error


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
        if isinstance(action, Specs):  # of dicts: its help has the default as it would be given
            shown = False
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser, Generic[C]):
    """A parser of the flags of a dataclass, whose complaints are UserErrors with the closest valid flag.

    Attributes:
        task: whose configs it takes, of `visionzoo.engine.configs.COMMANDS`.
        elsewhere: flags and keys of another command, which messages name, by name.
    """

    task = "classification"
    elsewhere: Mapping[str, str] = {}

    def __init__(self, config: type[C], usage: str, description: str) -> None:
        super().__init__(usage=usage, description=description, allow_abbrev=False, formatter_class=_Help)
        self._config = config
        add_flags(self, config)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below a page of usage."""
        raise UserError(f"{message} (--help lists all flags)")

    def parse(self, argv: Sequence[str] | None = None) -> C:
        """Parse `argv` (default: sys.argv); raises UserError on an unknown flag."""
        return filled(self._config, vars(self._parse(argv)))

    def _parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].split("=")[0]
            near = (
                _of_model(name.lstrip("-"), flags)
                or self._of_another(name.lstrip("-").replace("-", "_"))
                or closest(name, flags if name.startswith("-") else shipped_configs())
            )
            raise UserError(f"unknown argument {name}{near} (--help lists all flags)")
        words = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
        for action in self._actions:
            if action.nargs in ("+", "*") and sum(words.count(flag) for flag in action.option_strings) > 1:
                raise UserError(f"{action.option_strings[0]} is given twice; put all its values behind one")
        return args

    def parse_with_config(self, argv: Sequence[str] | None = None) -> C:
        """Parse `argv` over the YAML it names (positionally or by -c / --config), a file or one of ours.

        Raises:
            UserError: a flag or a key that does not exist, a value of the wrong type, an unreadable file.
        """
        first = self._parse(argv)
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
            task = task_of(found)
            if task and task != self.task:
                raise UserError(
                    f"{path} is a config of `visionzoo {COMMANDS[task]}`, which takes it as its first argument"
                )
            self.set_defaults(**self.read_config(found))
        return filled(self._config, {**vars(self._parse(argv)), "config": str(path) if path else None})

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
        return self.typed(content, str(path))

    def typed(self, content: Mapping[Any, Any], where: str) -> dict[str, Any]:
        """Return flags by name (`-` or `_`), each value checked as the flag's own.

        Raises:
            UserError: a key is no flag, or a value not one of its values; it names `where` they stand.
        """
        flags = {action.dest: action for action in self._actions if action.option_strings}
        values = {}
        for key, value in content.items():
            name = str(key).replace("-", "_")
            name = ALIASES.get(name, name)
            if name in WITHOUT_EFFECT.split() or (name in OFF and value in (None, *OFF[name])):
                continue
            if name in OFF:
                raise UserError(f"{where}: {key}: {value!r} is for timm's train script, this one cannot do it")
            if name not in flags or name == "help":
                near = _of_model(name, flags) or self._of_another(name) or closest(name, flags)
                raise UserError(f"{where}: unknown key {key!r}{near}")
            if value is not None:  # `key: null` keeps the default, as in the args.yaml that timm writes
                values[name] = _typed(flags[name], value, where=f"{where}: {key}")
        return values

    def _of_another(self, name: str) -> str:
        return f"; it belongs to `{self.elsewhere[name]}`" if name in self.elsewhere else ""


def _of_model(name: str, flags: Collection[str]) -> str:
    """Return how an argument of models is given, where a name is one and the command builds a model."""
    if name not in OF_MODELS or not {"model_kwargs", "--model-kwargs"} & set(flags):
        return ""
    return f"; it is an argument of the model: --model-kwargs {name}=VALUE, in YAML model_kwargs: {{{name}: VALUE}}"


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
            raise UserError(f"{where}: expected {count_of(action.nargs, 'value')}, got {value!r}")
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
