"""What tracers need: for torch.fx one node of what depends on shapes and devices, for torch.compile sizes and tuples.

One node it is whoever traces, and whatever leaves they know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Proxy

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=tuple[Any, ...])


def is_traced(*values: Any) -> bool:
    """Whether torch.fx traces what is computed of these."""
    return _first_proxy(values) is not None


def one_node(function: F) -> F:
    """Let a function, or a module's `forward`, be one node of a graph of torch.fx."""

    @wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        proxy = _first_proxy((*args, *kwargs.values()))
        if proxy is None:
            return function(*args, **kwargs)
        if isinstance(module := args[0], nn.Module):
            path = proxy.tracer.path_of_module(module)  # type: ignore[attr-defined]
            return proxy.tracer.create_proxy("call_module", path, args[1:], kwargs)
        return proxy.tracer.create_proxy("call_function", traced, args, kwargs)

    return traced  # type: ignore[return-value]


def replaced(fields: T, **changes: Any) -> T:
    """Return a named tuple with other values in some fields: torch.compile of torch 2.7 does not trace `_replace`."""
    names: Any = type(fields)._fields  # type: ignore[attr-defined]
    return type(fields)(**{**dict(zip(names, fields, strict=True)), **changes})


def smaller(one: Any, other: Any) -> Any:
    """Return the smaller of two sizes, known or not: torch.compile of torch 2.7 takes no sym_min of known ones."""
    known = isinstance(one, int) and isinstance(other, int)
    return min(one, other) if known else torch.sym_min(one, other)


def larger(one: Any, other: Any) -> Any:
    """Return the larger of two sizes, as `smaller` does."""
    known = isinstance(one, int) and isinstance(other, int)
    return max(one, other) if known else torch.sym_max(one, other)


def _first_proxy(values: Iterable[Any]) -> Proxy | None:
    for value in values:
        if isinstance(value, Proxy):
            return value
        if isinstance(value, (tuple, list)) and (proxy := _first_proxy(value)) is not None:
            return proxy
    return None
