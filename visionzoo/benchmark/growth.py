"""How time and memory of a mixer grow with the map: exponents from maps of 1,024 to 65,536 tokens.

Each step is forward and backward of as many tokens at once, of many small maps or one large, so that the device is as
full at each size; time and memory are those of one map. 1 is linear in tokens, 2 quadratic.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visionzoo.benchmark.timing import Budget, host_timing, peak_bytes, release, synchronize
from visionzoo.engine.calling import autocast, compile_model
from visionzoo.engine.flags import DeviceConfig, TrainConfig
from visionzoo.engine.parallel import start_process
from visionzoo.layers.mixers import build_mixer

SLOW = 10.0  # seconds of a step, after which larger maps are left out
TIMES = Budget(warmup_ms=50, repeat_ms=200)
FULL = (torch.OutOfMemoryError, MemoryError)


def map_sizes(smallest: int, largest: int) -> list[tuple[int, int]]:
    """Return heights and widths of maps, each of four times the tokens of the one before; about square.

    >>> map_sizes(1024, 65536)
    [(32, 32), (64, 64), (128, 128), (256, 256)]
    """
    sizes = []
    tokens = smallest
    while tokens <= largest:
        height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
        sizes.append((height, tokens // height))
        tokens *= 4
    return sizes


def exponent(tokens: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the slope of the line through the logarithms (least squares); None of fewer than two points.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    points = [(math.log(n), math.log(v)) for n, v in zip(tokens, values, strict=True) if v > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


@dataclass(frozen=True, slots=True)
class GrowthJob:
    """A mixer to be measured.

    Attributes:
        config: where, in which precision, from which seed, and whether compiled.
        mixer: its name and options.
        tokens: of the smallest and the largest map.
        dim: channels of the maps.
    """

    config: TrainConfig
    mixer: Mapping[str, Any]
    tokens: Sequence[int]
    dim: int

    @property
    def spec(self) -> str:
        """What tells it from others under the same name."""
        return json.dumps(self.mixer)


def measure_growth(job: GrowthJob) -> dict[str, Any]:
    """Measure a mixer on maps of more and more tokens.

    Returns:
        The exponents `time_exponent` and `memory_exponent` (None where memory is not counted, or maps are too few),
        `stops_at` tokens with its reason in `stops`, and milliseconds and MiB of a map of each size.
    """
    place = job.config.device
    device = start_process(place.device).device
    row: dict[str, Any] = {"time_exponent": None, "memory_exponent": None, "stops_at": None, "stops": ""}
    times: dict[int, float] = {}
    memory: dict[int, float] = {}
    sizes = map_sizes(*job.tokens)
    largest = sizes[-1][0] * sizes[-1][1]
    torch.manual_seed(place.seed)
    with torch.device(device):
        mixer: Any = build_mixer(job.mixer, job.dim)
        assert mixer is not None
    compile_model(job.config.model, mixer)
    for height, width in sizes:
        tokens = height * width
        batch = largest // tokens
        release()  # compiled code too: each size has its own, as in a model
        x = torch.randn(batch, height, width, job.dim, device=device, requires_grad=True)
        try:
            seconds, peak = _measure(mixer, x, place, device)
        except FULL:
            row |= {"stops_at": tokens, "stops": "memory"}
        except (RuntimeError, ValueError) as error:
            row |= {"stops_at": tokens, "stops": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        else:
            times[tokens] = seconds / batch
            row[f"ms_{tokens}"] = 1e3 * seconds / batch
            if peak is not None:
                memory[tokens] = peak / batch
                row[f"mib_{tokens}"] = peak / batch / 2**20
            if seconds > SLOW and tokens < largest:
                row |= {"stops_at": 4 * tokens, "stops": f"a step of {tokens:,} tokens takes over {SLOW:g} s"}
        if row["stops"]:
            break
    row["time_exponent"] = exponent(list(times), list(times.values()))
    row["memory_exponent"] = exponent(list(memory), list(memory.values()))
    return row


def _measure(
    mixer: Callable[[Tensor], Tensor], x: Tensor, precision: DeviceConfig, device: torch.device
) -> tuple[float, int | None]:
    """Return seconds and bytes of a step; the first call, which compiles, does not count unless the others are slow."""

    def step() -> None:
        with autocast(precision, device):
            out = mixer(x)
        out.float().square().mean().backward()
        x.grad = None
        for parameter in mixer.parameters():  # type: ignore[attr-defined]
            parameter.grad = None

    step()
    peak = peak_bytes(step, device)
    started = time.perf_counter()
    step()
    synchronize(device)
    seconds = time.perf_counter() - started
    return (seconds if seconds > 1 else 1e-3 * host_timing(step, device, TIMES).median_ms), peak
