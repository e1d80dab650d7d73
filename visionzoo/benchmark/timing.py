"""Clocks, peak memory, and the rates of the machine that bound every operation from below."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from visionzoo.kernels.small_maps import recorded

_AT_ONCE = 20  # calls between two looks at the clock, with up to a dozen launches each: queues hold about a thousand


@dataclass(frozen=True)
class Budget:
    """How long to warm up and to repeat, in milliseconds."""

    warmup_ms: int
    repeat_ms: int


@dataclass(frozen=True)
class Timing:
    """Median and the 20 % and 80 % quantiles of repeated calls, in milliseconds."""

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """Sum up the times of single calls."""
        if len(times) == 1:
            return cls(times[0], times[0], times[0], 1)
        cuts = statistics.quantiles(times, n=5, method="inclusive")
        return cls(statistics.median(times), cuts[0], cuts[-1], len(times))


def device_timing(call: Callable[[], Any], device: torch.device, budget: Budget) -> Timing:
    """Time what the device does: on a GPU by events, each call with a cold L2 cache (triton.testing.do_bench)."""
    if device.type != "cuda":
        return host_timing(call, device, budget)
    from triton.testing import do_bench

    return Timing.of(do_bench(call, warmup=budget.warmup_ms, rep=budget.repeat_ms, return_mode="all"))


def replayed_ms(call: Callable[[], Any], device: torch.device, budget: Budget) -> float | None:
    """Time the replay of a CUDA graph of a call, which launches nothing from the host; None where there are no graphs.

    Replayed one after the other, so that the L2 cache holds what fits of the data (triton.testing.do_bench_cudagraph).
    """
    if device.type != "cuda":
        return None
    from triton.testing import do_bench_cudagraph

    with recorded():  # which calls the function once before
        return do_bench_cudagraph(call, rep=budget.repeat_ms, return_mode="median")


def device_work(
    call: Callable[[], Any], device: torch.device, calls: int = 3
) -> tuple[float, float] | tuple[None, None]:
    """Add up what kernels and copies on the device take in a call, in ms, and count them; None on a CPU.

    By torch's profiler, over a few calls.
    """
    if device.type != "cuda":
        return None, None
    from torch.profiler import ProfilerActivity, profile

    call()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            call()
        synchronize(device)
    kernels = [event for event in trace.key_averages() if not getattr(event, "is_user_annotation", False)]
    return (
        1e-3 * sum(event.self_device_time_total for event in kernels) / calls,
        sum(event.count for event in kernels) / calls,
    )


def host_timing(call: Callable[[], Any], device: torch.device, budget: Budget, calls: int = 1) -> Timing:
    """Time from a call to its finished result, as the caller waits; at least three times.

    With several `calls` the one waits for the last of them, and the time is that of one.
    """
    start = time.perf_counter()
    while True:
        _timed(call, device, calls)
        if time.perf_counter() - start >= 1e-3 * budget.warmup_ms:
            break
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < 1e-3 * budget.repeat_ms:
        times.append(_timed(call, device, calls))
    return Timing.of(times)


def launch_timing(call: Callable[[], Any], device: torch.device, budget: Budget) -> Timing:
    """Time how long calls keep the host: the mean of a few at once, fewer than a GPU's queue holds, many times over."""
    host_timing(call, device, Budget(budget.warmup_ms, 0))
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < 1e-3 * budget.repeat_ms:
        start = time.perf_counter()
        for _ in range(_AT_ONCE):
            call()
        times.append(1e3 * (time.perf_counter() - start) / _AT_ONCE)
        synchronize(device)
    return Timing.of(times)


def _timed(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / calls


def release() -> None:
    """Let go of compiled code, graphs and memory that nothing holds, so that no measurement depends on those before."""
    if "torch._dynamo" in sys.modules:  # not loaded just for this
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that tensors take during a call beyond what they took before; None where it is not counted (CPU)."""
    if device.type != "cuda":
        return None
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: bytes a second of a large copy (read + written), FLOP/s of a large matrix product."""

    copy: float
    matmul: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, budget: Budget) -> Ceilings:
        """Measure both, on random numbers: zeros run faster."""
        gpu = device.type == "cuda"
        source = torch.empty(2**30 if gpu else 2**26, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        copy = device_timing(lambda: target.copy_(source), device, budget)
        size = 8192 if gpu else 512
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        matmul = device_timing(lambda: a @ b, device, budget)
        return cls(2 * source.numel() / (1e-3 * copy.median_ms), 2 * size**3 / (1e-3 * matmul.median_ms))


@dataclass(frozen=True)
class Cost:
    """What an operation must do at least: bytes to move (inputs read once, outputs written once) and FLOPs."""

    bytes: float
    flops: float

    def floor_ms(self, ceilings: Ceilings) -> float:
        """Time under which no implementation can stay on a machine with these rates."""
        return 1e3 * max(self.bytes / ceilings.copy, self.flops / ceilings.matmul)
