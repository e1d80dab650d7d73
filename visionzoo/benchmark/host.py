"""Cases of the host: how long a call keeps Python, beside an empty launch of Triton and torch's own operations.

Maps are so small, one of 14x14 or 7x7, that a GPU is done before the host can launch more. The clock stops when the
call returns, not when its result is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzoo.benchmark import operations
from visionzoo.benchmark.baselines import Inputs
from visionzoo.benchmark.cases import Absent, Case, Measurement, Run, Settings
from visionzoo.benchmark.implementations import BOTH, FORWARD, Draw, Problem

HEADS, DEPTH = 4, 32
IMPLEMENTATIONS = ("visionzoo", "visionzoo-triton", "visionzoo-reference", "sdpa", "sdpa-masked")


def host_cases(settings: Settings) -> list[Case]:
    """List all cases of the host."""
    settings = replace(settings, batch=settings.batch or 1)
    cases = [_floors(settings)]
    for side in (14, 7):
        cases += [_of_host(case, name, side) for name, case in _operations(settings, side)]
    return cases


def _of_host(case: Case, name: str, side: int) -> Case:
    """Measure the host in a case of the operations: without floors, which are the device's."""
    measurements = [
        replace(measurement, host=True, replay=False, peak=False, busy=True)
        for measurement in case.measurements
        if measurement.implementation in IMPLEMENTATIONS
    ]
    return replace(case, name=f"host-{name}/{side}x{side}", measurements=measurements, costs={})


def _operations(settings: Settings, side: int) -> Iterator[tuple[str, Case]]:
    dim = HEADS * DEPTH
    sizes: dict[str, Any] = {"batch": 1, "side": side, "heads": HEADS, "depth": DEPTH}
    yield "layer_norm", layer_norm_case(settings, "layer_norm", side, dim)
    yield "group_norm", operations.group_norm_case(settings, "group_norm", side, dim)
    yield "residual_norm", operations.residual_norm_case(settings, "residual_norm", side, dim, batch=1)
    for kernel in (3, 7, 9, 11):
        name = "depthwise" if kernel == 3 else f"depthwise-k{kernel}"
        yield name, operations.depthwise_case(settings, name, side, dim, kernel, None)
    yield "routing", operations.routing_case(settings, "routing", side=side, heads=HEADS, topk=4)
    yield "routed", operations.routed_case(settings, "routed", **sizes, regions=7, topk=4)
    yield "window", operations.window_case(settings, "window", side, HEADS)
    yield "neighborhood", operations.neighborhood_case(settings, "neighborhood", **sizes, kernel_size=7)
    yield "halo", operations.halo_case(settings, "halo", side, HEADS, DEPTH)
    yield "score", operations.score_case(settings, "score", **sizes, normalizer="sigmoid")
    yield "linear", operations.linear_case(settings, "linear", **sizes, feature_map="relu")
    yield "channel", operations.channel_case(settings, "channel", side, HEADS)


def layer_norm_case(settings: Settings, name: str, side: int, dim: int) -> Case:
    """Layer normalization, whose kernels "auto" leaves to torch on small maps."""

    def draw(normal: Draw) -> Inputs:
        return {"x": normal(normal.batch, side, side, dim), "weight": normal(dim, mean=1.0), "bias": normal(dim)}

    shape, implementations = f"{side}x{side}, {dim} channels", operations.zoo("layer_norm")
    measures = dict.fromkeys((FORWARD, BOTH), operations.Cost(0, 0))
    return Problem(
        settings, name, 1, shape, draw, implementations, lambda *_: measures, shared=("weight", "bias")
    ).case(side**2)


def _floors(settings: Settings) -> Case:
    """Return the case of launches that are not visionzoo's."""
    dtype, device = settings.low_dtype, settings.device
    x = partial(torch.randn, settings.batch or 1, HEADS, 196, DEPTH, dtype=dtype, device=device)

    def empty() -> Run:
        if device.type != "cuda":
            raise Absent(f"Triton launches nothing on {device.type}")
        from visionzoo.benchmark.empty_kernel import empty

        a = x()
        return Run(lambda: empty[(1,)](a, a, a, a, 1, 2, 3, 4.0))

    def torchs(function: Callable[..., Tensor], count: int, measure: str) -> Run:
        inputs = [x(requires_grad=measure == BOTH) for _ in range(count)]
        if measure == FORWARD:
            return Run(lambda: function(*inputs))
        upstream = x()
        return Run(lambda: torch.autograd.grad(function(*inputs), inputs, upstream))

    weight = torch.randn(DEPTH, DEPTH, dtype=dtype, device=device)
    functions: dict[str, tuple[Callable[..., Tensor], int]] = {
        "torch-add": (torch.add, 2),
        "torch-linear": (lambda a: F.linear(a, weight), 1),
        "torch-sdpa": (F.scaled_dot_product_attention, 3),
    }
    measurements = [Measurement("triton-empty", FORWARD, empty, peak=False, host=True)]
    measurements += [
        Measurement(name, measure, partial(torchs, function, count, measure), peak=False, host=True)
        for name, (function, count) in functions.items()
        for measure in (FORWARD, BOTH)
    ]
    shape = f"{HEADS} heads of {DEPTH}, 196 tokens"
    name = str(dtype).removeprefix("torch.")
    return Case("host-launch/14x14", settings.batch or 1, shape, "BGND", name, measurements, tokens=196)
