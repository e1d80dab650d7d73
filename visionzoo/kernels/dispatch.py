"""Which implementation of an operation runs, and why.

Each operation is a folder: `api.py` (validation and dispatch, the public function), `reference.py` (the
specification in plain torch, which runs everywhere) and, where one exists, `triton.py`.
"""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

BACKENDS = ("auto", "reference", "triton")
ENVIRONMENT_VARIABLE = "VISIONZOO_BACKEND"
# operation -> module of its Triton kernels, or None while it has none
OPERATIONS: dict[str, str | None] = {
    "halo_attention": None,
    "linear_attention": None,
    "route_regions": None,
    "routed_attention": None,
}

_logger = logging.getLogger(__name__)
_logged: set[str] = set()


def choose(operation: str, backend: str) -> str:
    """Return "reference" or "triton" for one call of `operation`.

    "auto" takes the environment variable VISIONZOO_BACKEND where that is set, and else falls back to the reference
    where triton cannot run, saying why once in the log.

    Raises:
        ValueError: if the name is unknown, or triton was asked for by name and cannot run.
    """
    asked = backend
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        asked = f"{ENVIRONMENT_VARIABLE}={backend}"
    if backend not in BACKENDS:
        raise ValueError(f"{operation}: unknown backend {asked!r}, expected one of {BACKENDS}")
    if backend == "reference":
        return "reference"
    reason = why_not_triton(operation)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"{operation}: backend {asked!r} cannot run: {reason}")
    if operation not in _logged and not torch.compiler.is_compiling():  # a log call would break the graph
        _logged.add(operation)
        _logger.info("%s runs its reference implementation: %s", operation, reason)
    return "reference"


def why_not_triton(operation: str) -> str | None:
    """Say why the Triton kernels of `operation` cannot run here, or None if they can."""
    if OPERATIONS[operation] is None:
        return "it has no Triton kernel yet"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def backends() -> dict[str, str]:
    """For each operation the backend that "auto" takes here, and the reason where that is the reference."""
    table = {}
    for operation in OPERATIONS:
        reason = why_not_triton(operation)
        table[operation] = "triton" if reason is None else f"reference ({reason})"
    return table
