"""Which implementation of an operation runs, and why.

Each operation is a folder: `api.py` (validation and dispatch, the public function), `reference.py` (the
specification in plain torch, which runs everywhere) and `triton.py` (kernels for a GPU, with their backward pass). Some
have `library.py`: torch's own operation, which small maps may take.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visionzoo._torch_private import is_exporting
from visionzoo.kernels import scope, small_maps
from visionzoo.kernels.scope import BACKENDS

OPERATIONS = (
    "channel_attention",
    "depthwise_conv",
    "group_norm",
    "halo_attention",
    "layer_norm",
    "linear_attention",
    "neighborhood_attention",
    "residual_norm",
    "route_regions",
    "routed_attention",
    "score_attention",
)
NOT_PAYING = {"residual_norm"}  # "auto" leaves their kernels out: measured on a GPU, they do not pay
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128
MAX_NUMBERS = 2**31  # of one sample: kernels count inside of samples in 32 bits, over samples in 64
MIN_CAPABILITY = (8, 0)  # compute capability; older GPUs have no bfloat16 matrix units

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()
_listeners: list[list[Decision]] = []
_verdicts: dict[Any, str | None] = {}  # for an operation and tensors like these: why its kernels cannot take them
_MOST_VERDICTS = 16384


@dataclass(frozen=True)
class Decision:
    """What one call of an operation ran, on which shape, and why not its Triton kernels (None where it ran these).

    Backends are "triton", "reference", and "library" for torch's own operation.
    """

    operation: str
    backend: str
    shape: tuple[int, ...]
    reason: str | None

    def __str__(self) -> str:
        because = f": {self.reason}" if self.reason else ""
        return f"{self.operation} {list(self.shape)} ran {self.backend}{because}"


@contextmanager
def explain() -> Iterator[list[Decision]]:
    """Collect what every call of an operation runs, and why, inside a `with` block.

    >>> import torch
    >>> from visionzoo.layers.mixers import WindowMixer
    >>> with explain() as decisions:
    ...     _ = WindowMixer(32, window_size=4)(torch.randn(1, 8, 8, 32))
    >>> print(decisions[0])
    routed_attention [1, 8, 8, 1, 32] ran reference: the tensors are on cpu, Triton kernels need a GPU
    """
    decisions: list[Decision] = []
    _listeners.append(decisions)
    try:
        yield decisions
    finally:
        _listeners.remove(decisions)


@contextmanager
def as_if_paying(operation: str, pays: bool) -> Iterator[None]:
    """Let "auto" take an operation's kernels in a `with` block as if they paid, or as if they did not."""
    kept = set(NOT_PAYING)
    (NOT_PAYING.discard if pays else NOT_PAYING.add)(operation)
    try:
        yield
    finally:
        NOT_PAYING.clear()
        NOT_PAYING.update(kept)


def choose(
    operation: str,
    backend: str,
    q: Tensor,
    v: Tensor | None = None,
    unsupported: str | None = None,
    avoid: str | None = None,
    max_width: int | None = MAX_HEAD_DIM,
    max_numbers: int | None = MAX_NUMBERS,
    tell: bool = True,
    library: str | None = "reference",
) -> str:
    """Return "reference" or "triton" for one call of `operation`, or `library`.

    "auto" takes what the surroundings ask for (`visionzoo.kernels.scope`). Where that is "auto" too, it falls back to
    the reference where triton cannot run or is to be avoided, saying why once in the log (and to `explain`). Under
    torch.export it is to be avoided: an exported program shall run where neither visionzoo nor Triton is. On small
    maps it takes `library` where that was measured to be the faster (`visionzoo.kernels.small_maps`).

    Args:
        operation: a name of `OPERATIONS`.
        backend: a name of `BACKENDS`.
        q: the operation's first tensor, [B, H, W, G, D], or [B, H, W, C] where there are no heads.
        v: its values, if their last axis may have another width.
        unsupported: what else the operation's kernels cannot do of this call; None for nothing.
        avoid: why "auto" takes the reference though the kernels can run, such as that they are the slower.
        max_width: largest last axis that they take; None for any.
        max_numbers: most numbers of one sample of q or v that they take; None for any.
        tell: the log and `explain`; not where nothing is called yet, by who has a better way than the reference.
        library: what is returned where torch's operation is the faster on small maps: "library", or "reference" where
            that is what torch has of this operation; None where it does not compute what this call asks for.

    Raises:
        ValueError: if the name is unknown, or triton was asked for by name and cannot run.
    """
    by_name = backend != "auto"
    if not by_name:
        backend = scope.backend
    if backend not in BACKENDS:
        asked = backend if by_name else scope.asked
        raise ValueError(f"{operation}: unknown backend {asked!r}, expected one of {BACKENDS}")
    reason: str | None = "it was asked for by name"
    compiling = torch.compiler.is_compiling()
    if backend != "reference":
        on_cpu = backend == "triton" and _interpreted()
        if compiling:  # which counts shapes as unknown, and cannot look into a table of them
            never = _why_not(q, v, max_width, on_cpu)
        else:
            key = operation, q.shape, None if v is None else v.shape, q.dtype, q.device, on_cpu
            try:
                never = _verdicts[key]
            except KeyError:
                if len(_verdicts) >= _MOST_VERDICTS:
                    _verdicts.clear()
                never = _verdicts[key] = _why_not(q, v, max_width, on_cpu) or _too_large(q, v, max_numbers)
        reason = _why_not_here() or never or unsupported
        if backend == "triton" and reason is not None:
            asked = backend if by_name else scope.asked
            raise ValueError(f"{operation}: backend {asked!r} cannot run: {reason}")
        if backend == "auto":
            reason = reason or avoid or _not_paying(operation) or _exporting()
    ran = "triton" if reason is None else "reference"
    if ran == "triton" and backend == "auto" and library is not None and not compiling:
        reason = small_maps.why_library(operation, q)
        ran = "triton" if reason is None else library
    if tell and not compiling:  # a log call would break the graph
        if backend == "reference" and not by_name:
            reason = f"{scope.asked} asks for it"
        for decisions in _listeners:
            decisions.append(Decision(operation, ran, tuple(q.shape), None if ran == "triton" else reason))
        if ran != backend and reason is not None and (operation, reason) not in _logged:
            _logged.add((operation, reason))
            what = "torch's operation" if ran == "library" else "its reference implementation"
            _logger.info("%s runs %s: %s", operation, what, reason)
    return ran


def backends() -> dict[str, str]:
    """For each operation the backend that "auto" takes for tensors on a GPU, and why where that is the reference.

    Where small maps take torch's operation, it says up to how many numbers (B·H·W·C) on the current GPU; neither
    compiled code nor CUDA graphs do. What a single call runs depends on its tensors too: see `explain`.
    """
    table = {}
    for operation in OPERATIONS:
        reason = _why_not_here() or (None if torch.cuda.is_available() else "there is no GPU")
        reason = reason or _not_paying(operation)
        if reason is None:
            small = small_maps.summary(operation, torch.device("cuda", torch.cuda.current_device()))
            table[operation] = f"triton ({small})" if small else "triton"
        else:
            table[operation] = f"reference ({reason})"
    return table


def _why_not_here() -> str | None:
    if not _HAS_TRITON:
        return "the package triton is not installed"
    return None


def _not_paying(operation: str) -> str | None:
    return "measured on a GPU, its kernels do not pay" if operation in NOT_PAYING else None


def _why_not(q: Tensor, v: Tensor | None, max_width: int | None, on_cpu: bool) -> str | None:
    """Say why Triton kernels cannot take tensors like these, or None if they can."""
    if q.dtype not in DTYPES:
        return f"its kernels take {', '.join(str(dtype) for dtype in DTYPES)}, got {q.dtype}"
    width = max(q.shape[-1], 0 if v is None else v.shape[-1])
    if max_width is not None and width > max_width:
        return f"its kernels take {'head ' * (q.ndim == 5)}widths up to {max_width}, got {width}"
    if q.device.type == "cpu":
        return None if on_cpu else "the tensors are on cpu, Triton kernels need a GPU"
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}, its kernels need an NVIDIA or AMD GPU"
    if torch.version.hip is None and (capability := _capability(q.device)) < MIN_CAPABILITY:
        return f"its kernels need compute capability {MIN_CAPABILITY}, this GPU has {capability}"
    return None


def _too_large(q: Tensor, v: Tensor | None, max_numbers: int | None) -> str | None:
    """Say that a sample has more numbers than kernels can count; in compiled code they say so when they run."""
    if max_numbers is None:
        return None
    numbers = max(t.numel() // max(1, len(t)) for t in (q, v) if t is not None)
    return None if numbers <= max_numbers else f"its kernels take up to {max_numbers} numbers a sample, got {numbers}"


_capabilities: dict[int | None, tuple[int, int]] = {}  # asking costs some µs every time


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    if device.index not in _capabilities:
        _capabilities[device.index] = torch.cuda.get_device_capability(device)
    return _capabilities[device.index]


def _exporting() -> str | None:
    """Say that torch.export (ONNX, AOTInductor) is tracing, or None; kernels asked for by name are exported."""
    if is_exporting():
        return "an exported program is made of torch's own operators"
    return None


def _interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU, for tests: only what asks for triton by name gets it."""
    return os.environ.get("TRITON_INTERPRET") == "1"
