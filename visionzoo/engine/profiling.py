"""What a run measures of itself: memory, waiting for images, a trace of its updates."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from visionzoo.engine.outputs import free_path
from visionzoo.text import count_of

TRACE, WARM_UP = "trace.json", 2
SLOW_LOADING = 0.3  # share of an epoch's time spent on waiting for images that is worth a word
SHORT_EPOCH = 10.0  # seconds, within which it is not


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory in use so far in MiB by its name: a GPU's, else the process's where the system counts."""
    if device.type == "cuda":
        return {"peak_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20}
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_process_memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10)}


class Waiting:
    """Seconds spent on waiting for images."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Count the time within `with`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def advice(self, seconds: float, workers: int) -> str | None:
        """Return what to say where waiting took much of the `seconds` of an epoch."""
        if seconds < SHORT_EPOCH or self.seconds < SLOW_LOADING * seconds:
            return None
        return (
            f"{self.seconds / seconds:.0%} of the epoch went by in waiting for images, with {workers} loading "
            "processes; more --workers, smaller image files or a faster disk would shorten it"
        )


class Trace:
    """A trace of a few updates: the third of this start and those after it, since the first ones are unlike the rest.

    Args:
        path: file to write, for ui.perfetto.dev or chrome://tracing; with a number where an earlier start left one.
        updates: how many; 0 traces nothing.
        device: of the training.
    """

    def __init__(self, path: Path, updates: int, device: torch.device) -> None:
        self.path = path
        self.wanted = updates
        self.device = device
        self._done = 0
        self._profiler: Any = None

    def step(self) -> str | None:
        """Count an update that is done; return what to say when the trace is written."""
        if not self.wanted:
            return None
        self._done += 1
        if self._done == WARM_UP:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        return self.close() if self._done == WARM_UP + self.wanted else None

    def close(self) -> str | None:
        """Write what has been traced, unless it is written; return what to say."""
        if not self.wanted:
            return None
        done, self.wanted = self._done - WARM_UP, 0
        if self._profiler is None:
            return f"nothing is traced: a trace begins after {WARM_UP} updates, there were {self._done}"
        self._profiler.stop()
        path = free_path(self.path)
        self._profiler.export_chrome_trace(str(path))
        return f"{count_of(done, 'update')} traced: {path}, to be looked at in ui.perfetto.dev"
