"""Which backend the surroundings of a call ask for: a scope, the process, the environment, in this order.

Two attributes of this module are computed when they are read: `backend`, a name of `BACKENDS` or what the environment
has in its place, and `asked`, who asks for it, in words. torch.compile reads such attributes at every call of compiled
code and compiles anew where they differ; it cannot trace a ContextVar before torch 2.14, and keeps what it once found
in a `threading.local`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

BACKENDS = ("auto", "reference", "triton")
ENVIRONMENT_VARIABLE = "VISIONZOO_BACKEND"

if TYPE_CHECKING:
    backend: str
    asked: str

_scope: ContextVar[str | None] = ContextVar("visionzoo_backend", default=None)
_process: str | None = None


def use_backend(name: str) -> AbstractContextManager[None]:
    """Let every operation inside a `with` block run one backend, whatever layer or model calls it.

    Scopes nest. One holds for its thread, for coroutines that are started in it, and for what gradient checkpointing
    runs again after it; not for threads that are started in it, those of `nn.DataParallel` among them, nor for
    processes that are spawned: see `set_backend`. It stands around compiled functions, not in them; these are compiled
    once for each backend.

    Args:
        name: "reference" for plain torch, "triton" for kernels (an error where they cannot run), "auto" for the best
            that can run.

    Raises:
        ValueError: if the name is unknown.

    >>> import torch
    >>> from visionzoo.kernels import explain
    >>> from visionzoo.layers.mixers import LinearMixer
    >>> with use_backend("reference"), explain() as decisions:
    ...     _ = LinearMixer(32)(torch.randn(1, 8, 8, 32))
    >>> print(decisions[0])
    linear_attention [1, 8, 8, 1, 32] ran reference: use_backend(reference) asks for it
    """
    _check("use_backend", name)
    return _enter(name)


@contextmanager
def _enter(name: str) -> Iterator[None]:
    token = _scope.set(name)
    try:
        yield
    finally:
        _scope.reset(token)


def set_backend(name: str | None) -> None:
    """Let every operation of this process run one backend, in all threads, where no `use_backend` says otherwise.

    Processes that are forked afterwards inherit it, such as a DataLoader's workers on Linux before Python 3.14; those
    that are spawned begin with the environment variable VISIONZOO_BACKEND.

    Args:
        name: as in `use_backend`; None leaves it to the environment again.

    Raises:
        ValueError: if the name is unknown.
    """
    global _process
    if name is not None:
        _check("set_backend", name)
    _process = name


def keep_backend(function: Callable[..., Any]) -> Callable[..., Any]:
    """Bind a function to the backend asked for now: autograd may run it again later, in a thread of its own."""
    if torch.compiler.is_compiling():  # compiled code has its backend in it
        return function
    name = _current()[0]

    def run(*args: Any) -> Any:
        with _enter(name):
            return function(*args)

    return run


def _check(function: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{function}: unknown backend {name!r}, expected one of {BACKENDS}")


def _current() -> tuple[str, str]:
    if (name := _scope.get()) is not None:
        return name, f"use_backend({name})"
    if _process is not None:
        return _process, f"set_backend({_process})"
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    return name, f"{ENVIRONMENT_VARIABLE}={name}"


def __getattr__(name: str) -> str:
    if name in ("backend", "asked"):
        return _current()[name == "asked"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
