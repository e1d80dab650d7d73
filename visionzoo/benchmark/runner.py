"""Run measurements one by one: what fails is a row with its reason, and the next one starts."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from visionzoo.benchmark.cases import Absent, Case, Measurement, Settings
from visionzoo.benchmark.results import Results, Row, environment
from visionzoo.benchmark.timing import (
    Ceilings,
    Timing,
    device_timing,
    device_work,
    host_timing,
    launch_timing,
    peak_bytes,
    release,
    replayed_ms,
    synchronize,
)
from visionzoo.engine.errors import require
from visionzoo.kernels import explain
from visionzoo.kernels.dispatch import Decision

MIB = 2**20


def run_cases(cases: Sequence[Case], settings: Settings, results: Results, *, minutes: float | None = None) -> None:
    """Measure all cases with a line for each row, on a terminal above a progress bar.

    Args:
        cases: what to measure.
        settings: of the run.
        results: where rows go.
        minutes: start nothing after that time; what is left of a case that has begun becomes rows that say so.
    """
    tqdm: Any = require("tqdm").tqdm
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    about = environment(settings.device)
    ceilings = None
    if any(case.costs for case in cases):
        ceilings = Ceilings.measure(settings.device, settings.low_dtype, settings.budget())
    total = sum(len(case.measurements) for case in cases)
    started, done = time.monotonic(), 0
    with tqdm(total=total, unit=" rows", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for case in cases:
            if _late(deadline):
                tqdm.write(f"{case.name}: not begun, the time is used up", file=sys.stdout)
                bar.update(len(case.measurements))
                continue
            results.begin(case.name)
            for measurement in case.measurements:
                bar.set_postfix_str(f"{case.name} {measurement.implementation}")
                row = _describe(case, measurement, about, ceilings)
                if _late(deadline):
                    row.status, row.reason = "skipped", f"the {minutes:g} minutes of the run were used up"
                else:
                    _measure(row, measurement, settings)
                    release()
                results.add(row)
                done += 1
                bar.update()
                tqdm.write(f"[{done}/{total}, {time.monotonic() - started:.0f} s] {summary(row)}", file=sys.stdout)
                sys.stdout.flush()
            case.close()


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _describe(case: Case, measurement: Measurement, about: dict[str, Any], ceilings: Ceilings | None) -> Row:
    row = Row(case.name, measurement.implementation, measurement.measure, **about)
    row.batch, row.tokens, row.shape, row.layout, row.dtype = (
        case.batch,
        case.tokens,
        case.shape,
        case.layout,
        case.dtype,
    )
    if ceilings is not None and measurement.measure in case.costs:
        cost = case.costs[measurement.measure]
        row.floor_bytes, row.floor_flops, row.floor_ms = cost.bytes, cost.flops, cost.floor_ms(ceilings)
        row.copy_gb_s, row.matmul_tflop_s = 1e-9 * ceilings.copy, 1e-12 * ceilings.matmul
    return row


def _measure(row: Row, measurement: Measurement, settings: Settings) -> None:
    """Fill in a row."""
    try:
        run = measurement.prepare()
        if measurement.tells:
            _fill(row, measurement, Timing.of(run.call()))
            return
        row.fixed_mib, row.held_mib = (None if n is None else n / MIB for n in (run.fixed_bytes, run.held_bytes))
        start = time.perf_counter()
        with explain() as decisions:
            result = run.call()
        synchronize(settings.device)
        row.first_call_s = time.perf_counter() - start
        row.reason = _backends(decisions)
        if run.check is not None:
            _compare(row, run.check, result)
        del result
        if not measurement.timed:
            return
        if measurement.peak:
            peak = peak_bytes(run.call, settings.device)
            row.peak_mib = None if peak is None else peak / MIB
        in_calls = partial(host_timing, calls=measurement.calls)
        clock = launch_timing if measurement.host else in_calls if measurement.wall else device_timing
        timing = clock(run.call, settings.device, settings.budget(measurement.scale))
        _fill(row, measurement, timing)
        if measurement.replay:
            row.replayed_ms = _replay(run.call, settings, measurement.scale)
        if measurement.busy:
            row.busy_ms, row.launches = device_work(run.call, settings.device)
    except Absent as error:
        row.status, row.reason = "absent", str(error)
    except Exception as error:  # whatever it is, the others are to be measured
        row.status, row.reason = "failed", _one_line(error)


def _fill(row: Row, measurement: Measurement, timing: Timing) -> None:
    """Fill in times."""
    row.median_ms, row.low_ms, row.high_ms = timing.median_ms, timing.low_ms, timing.high_ms
    row.repeats = timing.repeats
    if measurement.items is not None:
        row.images_per_second = 1e3 * measurement.items / timing.median_ms


def _replay(call: Callable[[], Any], settings: Settings, scale: float) -> float | None:
    """Time a CUDA graph of a call; None where it cannot be recorded."""
    try:
        return replayed_ms(call, settings.device, settings.budget(scale))
    except RuntimeError:  # it waits for the device, or is a CUDA graph itself
        return None


def _compare(row: Row, check: Callable[[Any], tuple[float, float]], result: Any) -> None:
    """Fill in the error; where the reference itself cannot run, say so: the time counts all the same."""
    try:
        row.error, row.allowed_error = check(result)
    except (Absent, torch.OutOfMemoryError) as error:
        row.reason = "; ".join(filter(None, [row.reason, f"not compared: {_one_line(error)}"]))


def _backends(decisions: Sequence[Decision]) -> str:
    """Say which backends our operations took in one call (nothing inside of compiled code), with the reasons."""
    counts = Counter((d.operation, d.backend, d.reason) for d in decisions)
    return "; ".join(
        f"{count} {operation} by {backend}" + (f" ({reason})" if reason else "")
        for (operation, backend, reason), count in counts.items()
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).partition("Stack trace:")[0].split())  # CUDA graphs add one, with this machine's paths
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def summary(row: Row) -> str:
    """Say a row in a line."""
    head = f"{row.case} {row.implementation} {row.measure}"
    if row.status != "ok":
        return f"{head}: {row.status}, {row.reason}"
    parts = []
    if row.median_ms is not None:
        parts.append(f"{row.median_ms:.4g} ms ({row.low_ms:.4g} to {row.high_ms:.4g})")
    if row.replayed_ms is not None:
        parts.append(f"replayed {row.replayed_ms:.4g} ms")
    if row.busy_ms is not None:
        parts.append(f"GPU busy {row.busy_ms:.4g} ms")
    if row.first_call_s is not None:
        parts.append(f"first call {row.first_call_s:.2g} s")
    if row.images_per_second is not None:
        parts.append(f"{row.images_per_second:.0f} img/s")
    if row.floor_ms is not None:
        parts.append(f"floor {row.floor_ms:.3g} ms")
    if row.peak_mib is not None:
        parts.append(f"peak {row.peak_mib:.1f} MiB")
    if row.error is not None:
        parts.append(f"error {row.error:.1e}" + ("" if row.agrees else f" ABOVE {row.allowed_error:.1e}"))
    return f"{head}: {', '.join(parts)}"
