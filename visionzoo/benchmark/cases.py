"""What is measured: a case is one problem, its measurements are the implementations of it and what is timed of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from visionzoo.benchmark.timing import Budget, Cost


class Absent(Exception):
    """An implementation that cannot take part here; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run.

    Args:
        device: where everything runs.
        dtype: of the operations and of models without autocast; None means bfloat16 on a GPU, float32 elsewhere.
        batch: instead of every case's own batch size.
        quick: fewer repeats, for a first look.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    batch: int | None = None
    quick: bool = False

    @property
    def low_dtype(self) -> torch.dtype:
        """Dtype in which things are measured."""
        return self.dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def budget(self, scale: float = 1.0) -> Budget:
        """How long to measure; `scale` is larger for what takes long, such as whole models."""
        warmup_ms, repeat_ms = (10, 40) if self.quick else (50, 200)
        return Budget(int(scale * warmup_ms), int(scale * repeat_ms))


@dataclass
class Run:
    """A measurement that is ready to run.

    Args:
        call: what is timed.
        check: from what `call` returned to its relative error and the error that is allowed.
        fixed_bytes: weights and inputs, which are there before the call.
        held_bytes: what has to be in memory at once at some time, see `visionzoo.benchmark.memory`.
    """

    call: Callable[[], Any]
    check: Callable[[Any], tuple[float, float]] | None = None
    fixed_bytes: int | None = None
    held_bytes: int | None = None


@dataclass
class Measurement:
    """One implementation and what is timed of it.

    Args:
        implementation: whose: "visionzoo", "visionzoo-triton", "authors", "timm", "sdpa", ...
        measure: "forward", "forward+backward", "inference", "training", "latency" or "agreement".
        prepare: builds all that is needed before the clock starts; raises `Absent` where that cannot be.
        items: images that one call handles; None for operations.
        wall: time from the call to its finished result, not what the device does.
        host: time until the call returns, whether or not the device has done what it launched.
        timed: False for measurements that only check.
        peak: whether the peak of memory says something (not inside CUDA graphs, whose memory is taken before).
        scale: of the time spent on it.
        replay: whether to time a CUDA graph of the call too.
        calls: calls between two looks at the clock, where `wall` holds; the times are those of one.
        busy: whether to add up what the device does in a call.
        tells: whether the call times itself: it returns milliseconds, and is called once.
    """

    implementation: str
    measure: str
    prepare: Callable[[], Run]
    items: int | None = None
    wall: bool = False
    host: bool = False
    timed: bool = True
    peak: bool = True
    scale: float = 1.0
    replay: bool = False
    calls: int = 1
    busy: bool = False
    tells: bool = False


@dataclass
class Case:
    """One problem: what all its measurements share."""

    name: str
    batch: int
    shape: str
    layout: str
    dtype: str
    measurements: list[Measurement]
    tokens: int | None = None
    costs: dict[str, Cost] = field(default_factory=dict)  # measure -> what it must do at least
    close: Callable[[], None] = lambda: None  # lets go of what the measurements shared


def select(cases: Iterable[Case], only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Case]:
    """Keep the measurements whose path `case/implementation/measure` fits a pattern of `only` and none of `skip`.

    A pattern with `*`, `?` or `[` must match the whole path, any other may stand anywhere in it.
    """
    kept = []
    for case in cases:
        case.measurements = [
            m
            for m in case.measurements
            if (not only or any(_fits(path(case, m), pattern) for pattern in only))
            and not any(_fits(path(case, m), pattern) for pattern in skip)
        ]
        if case.measurements:
            kept.append(case)
    return kept


def path(case: Case, measurement: Measurement) -> str:
    """Name of a measurement, which patterns match."""
    return f"{case.name}/{measurement.implementation}/{measurement.measure}"


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) if set(pattern) & set("*?[") else pattern in name
