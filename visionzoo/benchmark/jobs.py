"""Tasks in processes of their own, several at a time, spread over the GPUs: one that dies does not end the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from visionzoo.engine.checkpoints import make_folder
from visionzoo.engine.errors import Interrupted, UserError, printable
from visionzoo.engine.interruption import StopSignals
from visionzoo.engine.options import changed
from visionzoo.engine.parallel import Process

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PRELOADED = ["visionzoo.benchmark.comparison"]  # what a process finds imported
PATIENCE = 60.0  # seconds for a process to save what it has when the comparison is stopped


@dataclass(frozen=True)
class Failure:
    """Why a task did not succeed, in one line."""

    reason: str


Task = tuple[Callable[[Any], Any], Any]  # called with a dataclass whose `config` is a TrainConfig; both are pickled
Done = Callable[[Any, Any], None]  # receives the key of a task, and its result or a Failure


def failure(error: BaseException) -> Failure:
    """Return an error as one line: its kind where that is not ours, and what it says first."""
    said = printable(" ".join(str(error).split()))
    name = type(error).__name__
    return Failure((said if name == "UserError" else f"{name}: {said}" if said else name)[:400])


def devices(device: str | None) -> list[str]:
    """Return the devices that tasks are spread over: all GPUs, unless one device is named."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.cuda.device_count() if name == "cuda" else 0
    return [f"cuda:{i}" for i in range(found)] or [name]


def run_tasks(tasks: Mapping[Hashable, Task], done: Done, *, jobs: int | None, logs: Path) -> None:
    """Run tasks one after the other in this process, or `jobs` at a time in processes of their own.

    Args:
        tasks: functions of a module with their arguments, by keys.
        done: receives each result, here, as they come.
        jobs: how many at a time; None for this process. The loader's workers and the CPU's cores are shared out.
        logs: folder for what the processes print, a file for each.

    Raises:
        Interrupted: a signal came; tasks in work received it too, and had time to save what they have.
    """
    if jobs is None:
        for key, (call, job) in tasks.items():
            try:
                result = call(job)
            except Exception as error:
                if isinstance(error, Interrupted):
                    raise Interrupted(
                        error.signum, "what is done is kept; start the same command again to continue"
                    ) from error
                if not isinstance(error, UserError):  # whose message says all
                    traceback.print_exc()
                result = failure(error)
            done(key, result)
        return
    context = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload(PRELOADED)  # type: ignore[attr-defined]
    make_folder(logs)
    waiting = list(tasks.items())
    places = devices(waiting[0][1][1].config.device.device)
    free = list(range(min(jobs, len(waiting))))
    threads = max(1, (os.cpu_count() or 1) // max(1, len(free)))
    working: dict[Any, tuple[Hashable, Any, int]] = {}
    stop = StopSignals(Process(torch.device("cpu")))
    with stop, _ended(working):
        while waiting or working:
            while waiting and free:
                key, (call, job) = waiting.pop(0)
                slot = free.pop(0)
                device = places[slot % len(places)]
                workers = _share(job.config.data.workers, jobs)
                given = replace(job, config=changed(job.config, device=device, workers=workers))
                receiver, sender = context.Pipe(duplex=False)
                log = logs / f"{'-'.join(map(str, key)) if isinstance(key, tuple) else key}.txt".replace("/", ",")
                process = context.Process(  # type: ignore[attr-defined]
                    target=_work, args=(call, given, threads, str(log), sender)
                )
                process.start()
                sender.close()
                working[receiver] = key, process, slot
            stop.check()
            for ready in wait(list(working), timeout=0.2):
                key, process, slot = working.pop(ready)
                try:
                    result = ready.recv()  # type: ignore[union-attr, call-arg]
                except EOFError:
                    process.join()
                    result = Failure(f"its process ended with exit code {process.exitcode} and no message")
                process.join()
                free.append(slot)
                done(key, result)


def _share(workers: int, jobs: int) -> int:
    return max(1, workers // jobs) if workers else 0


@contextlib.contextmanager
def _ended(working: dict[Any, tuple[Hashable, Any, int]]) -> Iterator[None]:
    """Leave no process behind: those still at work are asked to save what they have, then ended."""
    try:
        yield
    except Interrupted as error:
        raise Interrupted(error.signum, "what is done is kept; start the same command again to continue") from None
    finally:
        processes = [process for _, process, _ in working.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


def _work(call: Callable[..., Any], job: Any, threads: int, log: str, sender: Any) -> None:
    """Be the process of a task: print into its log, and send its result or why there is none."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C goes to the whole group: this process is stopped by the one that started it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(log, "a", buffering=1) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        torch.set_num_threads(threads)
        try:
            result = call(job)
        except Exception as error:
            traceback.print_exc()
            result = failure(error)
        try:
            sender.send(result)
        except (OSError, ValueError):
            print("the process that waited for the result has gone")
