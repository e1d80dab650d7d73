"""Former names of arguments, of their values and of tensors: they are still taken, for older code and weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

FORMER_KEYS = [(r"(^|\.)normaliser\.", r"\1normalizer.")]  # of tensors in checkpoints, as pattern and replacement


def former_names(call: Callable[..., Any]) -> dict[str, str]:
    """Return what arguments of a function or a class were called before, and are called now."""
    return getattr(vars(call).get("__init__") if isinstance(call, type) else call, "_former_names", {})


def with_former_names(
    values: Mapping[str, Mapping[str, str]] | None = None, **names: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function take keyword arguments by their former names, and former values of them.

    Args:
        values: for arguments by their new names, former values and what stands for them now.
        names: the new name of each former one.

    Raises:
        TypeError: in calls that give an argument by both names.
    """

    def decorate(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            for former, name in names.items():
                if former in kwargs:
                    if name in kwargs:
                        raise TypeError(f"{call.__qualname__}: got {name} and its former name {former}; leave one out")
                    kwargs[name] = kwargs.pop(former)
            for name, new in (values or {}).items():
                if name in kwargs and isinstance(kwargs[name], str):
                    kwargs[name] = new.get(kwargs[name], kwargs[name])
            return call(*args, **kwargs)

        called._former_names = names  # type: ignore[attr-defined]
        return called

    return decorate


def take_former_keys(module: nn.Module) -> None:
    """Let `load_state_dict` of a module, and of those that hold it, take tensors by their former names."""
    module.register_load_state_dict_pre_hook(_rename)


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename tensors before `load_state_dict`; a function of the file, so that modules that have it can be pickled."""
    for key in [key for key in state if key.startswith(prefix)]:
        name = key[len(prefix) :]
        for pattern, replacement in FORMER_KEYS:
            name = re.sub(pattern, replacement, name)
        if prefix + name != key:
            state[prefix + name] = state.pop(key)
