"""What we aim at, as a table, and what rows of results say of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from visionzoo.benchmark.models import PAIRS, smallest
from visionzoo.benchmark.results import Row
from visionzoo.benchmark.training import COMMANDED, JOINED, TRAINED

# quantity -> whether the aim is a lower bound
QUANTITIES = {
    "times as fast as": True,  # their median over ours
    "times the floor": False,  # our median over what the machine's rates allow
    "ms": False,  # our median
    "s of a first call": False,  # ours, in which kernels are compiled; for an operation, of all its first calls
    "empty launches a kernel": False,  # time until a call returns, over its kernels and an empty kernel's time
    "times what must be held": False,  # peak over held memory
    "growth exponent": False,  # of peak memory with the number of tokens: 1 is linear
}


# with a backward pass, in the suite `host`
HOST_OPERATIONS = (
    *("layer_norm", "group_norm", "residual_norm", "depthwise", "depthwise-k7", "depthwise-k9", "depthwise-k11"),
    *("routed", "window", "neighborhood", "halo", "score", "linear", "channel"),
)
# at batch 128 and 1, the stages of a BiFormer-T
RESIDUAL_NORMS = tuple(
    f"residual_norm/{batch}x{side}x{side}-c{dim}"
    for batch in (128, 1)
    for side, dim in ((56, 64), (28, 128), (14, 256), (7, 512))
)


@dataclass(frozen=True)
class Target:
    """One aim.

    Args:
        case: name of the case; for the growth exponent the beginning of the names of a series.
        measure: what of it.
        quantity: one of `QUANTITIES`.
        aim: what the quantity should be, at least or at most.
        baseline: implementation that is compared with, for "times as fast as".
        ours: our implementation.
        graphs: whether what counts is the time of CUDA graphs of the calls.
    """

    case: str
    measure: str
    quantity: str
    aim: float
    baseline: str = ""
    ours: str = "visionzoo"
    graphs: bool = False


@dataclass(frozen=True)
class Verdict:
    """What became of a target: the quantity measured, or the reason why it was not.

    `replayed` is the same quantity of CUDA graphs, where there are any: the time of the GPU by itself.
    """

    target: Target
    measured: float | None
    reason: str = ""
    replayed: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None where nothing was measured."""
        if self.measured is None:
            return None
        at_least = QUANTITIES[self.target.quantity]
        return self.measured >= self.target.aim if at_least else self.measured <= self.target.aim


def targets() -> Iterator[Target]:
    """Yield all aims; they are meant for one H100 in bfloat16 and each case's own batch size."""
    both, faster = "forward+backward", "times as fast as"
    for case in ("routed/56x56-g2-d32-k1", "routed/28x28-g4-d32-k4"):
        yield Target(case, "forward", faster, 5.0, "authors")
        yield Target(case, both, faster, 8.0, "authors")
    yield Target("routed/56x56-g2-d32-k1", "forward", "times the floor", 2.5)
    for measure in ("forward", both):
        yield Target("routed/14x14-g8-d32-k16", measure, faster, 1.0, "sdpa-masked")
        yield Target("routed/14x14-g8-d32-k16", measure, faster, 1.0, "sdpa-masked", graphs=True)

    yield Target("neighborhood/56x56-g2-d32-k7-x1", "forward", faster, 3.0, "flex")
    yield Target("neighborhood/56x56-g2-d32-k7-x1", both, faster, 2.5, "flex")
    for measure in ("forward", both):
        yield Target("neighborhood/28x28-g4-d32-k7-x1", measure, faster, 2.0, "flex")
    stages = ("56x56-g2-d32-k7-x1", "56x56-g2-d32-k7-x8", "28x28-g4-d32-k7-x1", "28x28-g4-d32-k7-x4")
    for stage in (*stages, "14x14-g8-d32-k7-x1", "14x14-g8-d32-k7-x2", "7x7-g16-d32-k7-x1"):
        for measure in ("forward", both):
            yield Target(f"neighborhood/{stage}", measure, faster, 1.0, "sdpa")

    for case in RESIDUAL_NORMS:
        for measure in ("forward", both):
            yield Target(case, measure, faster, 1.0, "visionzoo-apart", "visionzoo-triton", graphs=True)

    for stage in ("56x56-g2-d32-k7-s4", "56x56-g2-d32-k7-s7", "128x128-g4-d64-k13-s4", "128x128-g4-d64-k16-s8"):
        for measure in ("forward", both):
            yield Target(f"neighborhood/{stage}", measure, faster, 1.0, "natten")
            yield Target(f"neighborhood/{stage}", measure, faster, 1.1, "visionzoo-stride-1")

    for measure in ("forward", both):
        yield Target("score/64x64-g8-d64-sigmoid", measure, faster, 1.0, "sdpa")

    for shape in ("56x56-g2-d32", "256x256-g4-d32"):
        for feature_map in ("focused", "relu", "elu", "softmax"):
            yield Target(f"linear/{shape}-{feature_map}", "forward", "times the floor", 2.5)
            if shape.startswith("256"):
                for measure in ("forward", both):
                    yield Target(f"linear/{shape}-{feature_map}", measure, "times the floor", 2.5, graphs=True)
            for measure in ("forward", both):
                baseline = "visionzoo-reference-compiled"
                yield Target(f"linear/{shape}-{feature_map}", measure, faster, 1.0, baseline)

    compiled, optimized = "visionzoo-compiled", "visionzoo-optimized"
    yield Target("biformer_t/eager", "inference", faster, 3.0, "authors")
    yield Target("biformer_t/compiled", "inference", faster, 2.0, "authors-compiled", compiled)
    yield Target("biformer_t/training", "training", faster, 2.5, "authors")
    for model in ("davit_t", "halonet_50ts"):
        yield Target(f"{model}/eager", "inference", faster, 1.5, "timm")
    for model in ("levit_128s", "levit_256", "shvit_s1", "shvit_s4", "poolformer_s12", "poolformer_s24"):
        yield Target(f"{model}/eager", "inference", faster, 1.0, "timm")
        yield Target(f"{model}/autocast", "inference", faster, 1.0, "timm")
        yield Target(f"{model}/training", "training", faster, 1.0, "timm")
        yield Target(f"{model}/compiled", "inference", faster, 1.0, "timm-compiled", compiled)
        yield Target(f"{model}/compiled", "inference", faster, 1.2, "timm-compiled", optimized)
    for pair in PAIRS:
        yield Target(f"{pair.name}/latency", "latency", faster, 1.0, pair.whose)
    for ours in ("visionzoo-compiled-graph", "visionzoo-command"):
        yield Target("biformer_t/step", "training", faster, 4.5, "authors", ours)
        for model in COMMANDED[1][1:]:
            yield Target(f"{model}/step", "training", faster, 1.5, "timm", ours)
            yield Target(f"{model}/step", "training", faster, 1.15, "timm-compiled-graph", ours)
    yield Target("biformer_t/step", "training", faster, 1.8, "visionzoo-command", "visionzoo-command-2-gpus")
    for pair in TRAINED:
        yield Target(f"{pair.name}/step", "training", "s of a first call", 20.0)
    for pair in TRAINED:
        if pair.ours in JOINED:
            yield Target(
                f"{pair.name}/step", "training", faster, 1.0, "visionzoo-apart-graph", "visionzoo-joined-graph"
            )
    for pair in smallest():
        yield Target(f"{pair.name}/latency", "latency", "ms", 1.5, ours=optimized)

    for operation in HOST_OPERATIONS:
        yield Target(f"host-{operation}/14x14", both, "s of a first call", 2.0)
    yield Target("host-routing/14x14", "forward", "s of a first call", 2.0)
    for operation in ("routing", *HOST_OPERATIONS):
        for measure, aim in (("forward", 2.0), (both, 3.0)):
            if (operation, measure) != ("routing", both):
                name = f"host-{operation}/14x14"
                yield Target(name, measure, "empty launches a kernel", aim, ours="visionzoo-triton")
    for side in (14, 7):
        for operation in ("routed", "neighborhood"):
            yield Target(f"host-{operation}/{side}x{side}", both, faster, 1.0, "sdpa-masked")

    for regions in (7, 16):
        yield Target(f"biformer_s-800x1333/regions-{regions}", "training", "times what must be held", 1.3)
    for operation in ("routed", "neighborhood", "linear"):
        yield Target(f"tokens-{operation}/", both, "growth exponent", 1.05)


def judge(target: Target, rows: Sequence[Row]) -> Verdict:
    """Look up a target in rows of results; rows whose results are off do not count."""
    if target.quantity == "growth exponent":
        return _growth(target, rows)
    if target.graphs:
        verdict = judge(replace(target, graphs=False), rows)
        reason = verdict.reason or ("" if verdict.replayed else "no CUDA graphs of both were measured")
        return Verdict(target, None if verdict.reason else verdict.replayed, reason)
    ours = _find(rows, target, target.ours)
    if isinstance(ours, str):
        return Verdict(target, None, ours)
    if ours.agrees is False:
        return Verdict(target, None, f"{target.ours} is off by {ours.error:.1e}, allowed is {ours.allowed_error:.1e}")
    assert ours.median_ms is not None
    if target.quantity == "ms":
        return Verdict(target, ours.median_ms)
    if target.quantity == "s of a first call":
        return _first_calls(target, rows)
    if target.quantity == "empty launches a kernel":
        return _launches(target, ours, rows)
    if target.quantity == "times the floor":
        verdict = _quotient(target, ours.median_ms, ours.floor_ms, "no floor")
        return replace(verdict, replayed=_ratio(ours.replayed_ms, ours.floor_ms))
    if target.quantity == "times what must be held":
        if ours.peak_mib is None or ours.fixed_mib is None:
            return Verdict(target, None, "memory is not counted there")
        return _quotient(target, ours.fixed_mib + ours.peak_mib, ours.held_mib, "no held memory")
    theirs = _find(rows, target, target.baseline)
    if isinstance(theirs, str):
        return Verdict(target, None, theirs)
    if theirs.agrees is False:
        return Verdict(target, None, f"{target.baseline} computes something else, it differs by {theirs.error:.1e}")
    assert theirs.median_ms is not None
    replayed = _ratio(theirs.replayed_ms, ours.replayed_ms)
    return Verdict(target, theirs.median_ms / ours.median_ms, replayed=replayed)


def _first_calls(target: Target, rows: Sequence[Row]) -> Verdict:
    """Add up the first calls of ours, forward and with backward, by what "auto" takes and by the kernels."""
    found = [
        row.first_call_s
        for row in rows
        if (row.case, row.status) == (target.case, "ok")
        and row.implementation in (target.ours, f"{target.ours}-triton")
    ]
    times = [seconds for seconds in found if seconds]
    return Verdict(target, sum(times)) if times else Verdict(target, None, "first call not measured")


def _launches(target: Target, ours: Row, rows: Sequence[Row]) -> Verdict:
    empty = _find(rows, replace(target, case="host-launch/14x14", measure="forward"), "triton-empty")
    if isinstance(empty, str):
        return Verdict(target, None, empty)
    assert ours.median_ms is not None and empty.median_ms is not None
    return _quotient(target, ours.median_ms / empty.median_ms, ours.launches, "launches not counted")


def _ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value and unit else None


def _find(rows: Sequence[Row], target: Target, implementation: str) -> Row | str:
    """Return the row, or why there is none that says something."""
    for row in rows:
        if row.measure == "agreement" and row.case == f"{target.case.split('/')[0]}/agreement" and row.agrees is False:
            return f"the two models differ by {row.error:.1e} in float64"
    for row in rows:
        if (row.case, row.implementation, row.measure) == (target.case, implementation, target.measure):
            return row if row.status == "ok" else f"{implementation} {row.status}: {row.reason}"
    return f"{implementation} not measured"


def _quotient(target: Target, value: float, unit: float | None, lacking: str) -> Verdict:
    return Verdict(target, None, lacking) if not unit else Verdict(target, value / unit)


def _growth(target: Target, rows: Sequence[Row]) -> Verdict:
    points = sorted(
        (row.tokens, row.peak_mib)
        for row in rows
        if row.case.startswith(target.case)
        and (row.implementation, row.measure, row.status) == (target.ours, target.measure, "ok")
        and row.tokens is not None
        and row.peak_mib is not None
    )
    if len(points) < 2:
        why = "not measured" if not points else "measured at one size, two are needed"
        return Verdict(target, None, f"{target.ours} {why}")
    (fewer, less), (more, most) = points[-2:]
    return Verdict(target, math.log(most / less) / math.log(more / fewer))
