"""Cases of reducers: what a model does in a second against the tokens that its reducers leave.

Weights are random, so that this is only about time. The interpreter is left out: how many tokens it keeps depends on
weights and images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch

from visionzoo.benchmark.cases import Case, Measurement, Run, Settings
from visionzoo.benchmark.models import storage_bytes
from visionzoo.layers.reducers import REDUCERS

NAMES = tuple(name for name, reducer in REDUCERS.items() if not reducer.VARIES)
RATES = (0.9, 0.7, 0.5, 0.3)  # what each of a model's three reducers keeps


def reducer_cases(
    settings: Settings,
    model: str = "zoo_deit_s",
    *,
    size: int = 224,
    rates: Sequence[float] = RATES,
    names: Sequence[str] = NAMES,
    **options: Any,
) -> list[Case]:
    """List the cases: the model as it is, and for each share every reducer that keeps it.

    Args:
        settings: of the run.
        model: name of an isotropic model.
        size: of the images, in pixels.
        rates: shares that each of the reducers keeps.
        names: of the reducers.
        options: arguments of the model.
    """
    batch = settings.batch or (256 if settings.device.type == "cuda" else 8)
    shape = (batch, 3, size, size)
    cases = []
    for rate in (1.0, *rates):
        reduces = {"none": None} if rate == 1 else {name: {"type": name, "keep_rate": rate} for name in names}
        measurements = [
            Measurement(name, "inference", partial(_prepare, settings, model, shape, reduce, options), items=batch)
            for name, reduce in reduces.items()
        ]
        dtype = str(settings.low_dtype).removeprefix("torch.")
        tokens = left(model, size, next(iter(reduces.values())), options)
        name = f"{model.removeprefix('zoo_')}-{size}/keep-{rate:g}"
        cases.append(Case(name, batch, "x".join(map(str, shape)), "NCHW", dtype, measurements, tokens=tokens))
    return cases


def left(model: str, size: int, reduce: Any, options: dict[str, Any]) -> int:
    """Return how many of the map's tokens come out of the last block."""
    built: Any = timm.create_model(model, reduce=reduce, device="meta", **options).eval()
    state = built.begin(torch.empty(1, built.in_chans, size, size, device="meta"))
    for i in range(len(built.parts)):
        state = built.advance(i, state)
    return state.x.shape[1] - state.prefix


def _prepare(settings: Settings, model: str, shape: tuple[int, ...], reduce: Any, options: dict[str, Any]) -> Run:
    with torch.device(settings.device):
        built = timm.create_model(model, reduce=reduce, **options).eval().to(settings.low_dtype)
        images = torch.randn(shape, dtype=settings.low_dtype)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return built(images)

    return Run(call, fixed_bytes=storage_bytes([*built.parameters(), *built.buffers(), images]))
