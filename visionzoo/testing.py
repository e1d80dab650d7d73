"""How close is close enough: comparing a kernel with float64, for the zoo's kernels and for yours.

Tolerances come from the data. An implementation in float32 or lower may be at most twice as far from float64 as plain
torch is in the same dtype on the same numbers: `compare_with_float64`. References compute in float32 at least, while
matrix units take factors in the dtype: a kernel that uses them is compared with its reference under `matrix_units`. A
test by such a bound has to refuse results that are wrong: `controls` makes some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visionzoo._torch_private import TorchDispatchMode

Results = dict[str, Tensor]
FACTOR = 2.0  # times the error of plain torch


@dataclass(frozen=True)
class Comparison:
    """Relative errors ‖x − exact‖ / ‖exact‖ of a result, and what it may be."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is finite and allowed."""
        return self.error <= self.allowed  # NaN is not


def run(operation: Callable[..., Tensor], tensors: Mapping[str, Tensor | None], **options: object) -> Results:
    """Call an operation and differentiate its output along a fixed unit-normal direction.

    Args:
        operation: called with `tensors` and `options` by name; returns one tensor.
        tensors: those that require gradients get them; others, and None, are passed on.
        options: further arguments.

    Returns:
        "out", and "grad NAME" for every tensor that requires one.
    """
    learning = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None and t.requires_grad}
    out = operation(**{**tensors, **learning}, **options)
    results = {"out": out.detach()}
    if learning:
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=generator).to(out)
        grads = torch.autograd.grad(out, list(learning.values()), upstream)
        results |= {f"grad {name}": grad for name, grad in zip(learning, grads, strict=True)}
    return results


def compare_with_float64(candidate: Results, plain: Results, exact: Results) -> list[Comparison]:
    """Compare a kernel's results with float64, by the measure of plain torch in the kernel's dtype.

    Where plain torch happens to be all but exact, its error counts as what rounding costs: a quarter of the dtype's
    spacing for only rounding the result; in float32, in which every step rounds, two spacings: a backward pass that
    recomputes a softmax from its logarithm rounds numbers as large as the scores.

    Args:
        candidate: results of the kernel, see `run`.
        plain: of the reference in the same dtype, on the same numbers.
        exact: of the reference in float64, on the same numbers.

    Raises:
        ValueError: if they do not hold the same results, in the same shapes and dtypes.
    """
    comparisons = []
    for name, expected in exact.items():
        if name not in candidate or candidate[name].shape != expected.shape:
            got = tuple(candidate[name].shape) if name in candidate else "nothing"
            raise ValueError(f"{name}: expected {tuple(expected.shape)}, got {got}")
        if candidate[name].dtype != plain[name].dtype:
            raise ValueError(f"{name}: expected {plain[name].dtype}, got {candidate[name].dtype}")
        dtype = plain[name].dtype
        rounding = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 0.25)
        allowed = FACTOR * max(relative_error(plain[name], expected), rounding)
        comparisons.append(Comparison(name, relative_error(candidate[name], expected), allowed))
    return comparisons


def relative_error(x: Tensor, exact: Tensor) -> float:
    """‖x − exact‖ / ‖exact‖ in float64; ‖x‖ where `exact` is all zeros."""
    x, exact = x.double().cpu(), exact.double().cpu()
    return float((x - exact).norm() / (exact.norm() or 1.0))


def controls(results: Results) -> dict[str, Results]:
    """Return wrong results that every comparison must refuse: each changes one tensor of `results`."""
    wrong: dict[str, Results] = {}
    for name, value in results.items():
        changes = {
            "zeros": torch.zeros_like(value),
            "half": value / 2,
            "shifted by one": value.roll(1, 2 if value.ndim > 2 else -1),
            "one number not written": _unwritten(value),
        }
        wrong |= {f"{name}: {change}": {**results, name: other} for change, other in changes.items()}
    return wrong


def _unwritten(value: Tensor) -> Tensor:
    value = value.clone()
    value.view(-1)[-1] = torch.nan
    return value


class matrix_units(TorchDispatchMode):
    """Round the factors of matrix products to a dtype, forward and backward, and sum as before: as matrix units do.

    Numbers that the dtype cannot hold stay as they are.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            args = [self._round(t) for t in args]
        return func(*args, **(kwargs or {}))

    def _round(self, factor: Tensor) -> Tensor:
        rounded = factor.to(self.dtype).to(factor.dtype)
        return torch.where(rounded.isinf(), factor, rounded)


@contextmanager
def poisoned_memory():
    """Fill memory that torch allocates without initializing it with NaN, so that what a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
