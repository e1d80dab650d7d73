"""Two processes that train together over gloo, forked from one that has imported everything."""

import contextlib
import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_two_processes(function: Callable[..., Any], *args: Any, environment: str = "torchrun") -> list[Any]:
    """Return what a function of a module returns in two processes that can join each other, the first one's first.

    Raises:
        AssertionError: one of them has failed; with its traceback.
    """
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["visionzoo.engine.training"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    queue: Any = fork.SimpleQueue()
    children = [
        fork.Process(target=_run, args=(queue, rank, _variables(environment, rank, port), function, args))
        for rank in range(2)
    ]
    for child in children:
        child.start()
    found = dict(queue.get() for _ in children[:1])
    if not isinstance(next(iter(found.values())), Failure):  # else the other one may wait for it
        found |= dict([queue.get()])
    for child in children:
        if len(found) < 2:
            child.kill()
        child.join()
    failures = [str(value) for value in found.values() if isinstance(value, Failure)]
    assert not failures, failures[0]
    return [found[0], found[1]]


class Failure(str):
    """The traceback of a process that has failed."""


def _variables(environment: str, rank: int, port: int) -> dict[str, str]:
    common = {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if environment == "slurm":
        return common | {
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NODELIST": "localhost",
        }
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return common | ranks | {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}


def _run(queue: Any, rank: int, variables: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            result = function(*args)
    except BaseException:
        result = Failure(f"process {rank}:\n{said.getvalue()[-2000:]}\n{traceback.format_exc()}")
    queue.put((rank, result))


def losses(folder: Path) -> list[float]:
    """Return the loss of every update from a run's TensorBoard log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder))
    log.Reload()
    return [event.value for event in log.Scalars("train/loss")]
