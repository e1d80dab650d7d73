"""Runs that are killed, wherever they stand, and continue: the end is that of a run which was never killed."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from engine.helpers import assert_same, learned, results

from visionzoo.engine import building
from visionzoo.engine.checkpoints import CheckpointFolder, read_checkpoint
from visionzoo.engine.training import train

METRICS = [50.0, 80.0, 70.0, 60.0, 90.0]  # of five epochs, of which two are kept beside the last


class Killed(BaseException):
    """Stands for the end of the process: nothing that would clean up runs after it."""


@pytest.fixture
def kill_at(monkeypatch):
    """Let the process end before its n-th change on the disk."""

    def arm(moment):
        def ending(original):
            def change(*args, **kwargs):
                arm.changes += 1
                if arm.changes >= moment:
                    raise Killed
                return original(*args, **kwargs)

            return change

        arm.changes = 0
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "link"), (Path, "unlink")):
            patch.setattr(owner, name, ending(getattr(owner, name)))

    with pytest.MonkeyPatch.context() as patch:
        yield arm, patch.undo


def write(folder, first=0):
    for epoch in range(first, len(METRICS)):
        state = {"epoch": epoch, "state_dict": {"weight": torch.full((9,), float(epoch))}}
        folder.save_recovery({**state, "epoch": epoch, "batches_done": 1})
        folder.save({**state, "batches_done": 2}, epoch, METRICS[epoch])


def content(path):
    return {file.name: read_checkpoint(file)["epoch"] for file in path.iterdir()}


def test_checkpoints_are_complete_after_a_kill_before_any_change_on_the_disk(tmp_path, kill_at):
    kill, revive = kill_at
    write(CheckpointFolder(tmp_path, keep=2, lower_is_better=False))
    whole = content(tmp_path)
    assert whole == {"last.pth.tar": 4, "model_best.pth.tar": 4, "checkpoint-4.pth.tar": 4, "checkpoint-1.pth.tar": 1}
    moment, finished = 0, False
    while not finished:
        moment += 1
        path = tmp_path / str(moment)
        path.mkdir()
        folder = CheckpointFolder(path, keep=2, lower_is_better=False)
        kill(moment)
        try:
            write(folder)
            finished = True
        except Killed:
            pass
        revive()
        folder = CheckpointFolder(path, keep=2, lower_is_better=False)
        folder.clear_leftovers()
        first = 0
        if found := folder.newest(pytest.fail):
            file, state = found
            folder.continue_from(file, state)
            first = state["epoch"] + ("metric" in state)
        write(folder, first)
        assert content(path) == whole, moment
    assert moment > 40


def test_a_run_killed_right_after_its_first_file_can_be_started_again(make_args, tmp_path, monkeypatch):
    write, written = building.write_atomically, []

    def ending(path, content):
        write(path, content)
        written.append(path.name)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(building, "write_atomically", ending)
        with pytest.raises(Killed):
            train(make_args(epochs=1, max_steps=1))
    assert len(written) == 1 and (tmp_path / "output/run" / written[0]).exists()
    train(make_args(epochs=1, max_steps=1, resume="auto"))
    assert (tmp_path / "output/run/last.pth.tar").exists()


def run_to_the_end(args):
    torch.set_num_threads(1)
    train(args)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_that_ran_through(make_args, tmp_path):
    options = dict(epochs=32, recovery_interval=1, model_ema=True, mixup=0.4, reprob=0.3, sched_on_updates=True)
    train(make_args(experiment="straight", **options))
    killed = make_args(experiment="killed", resume="auto", **options)
    fork = multiprocessing.get_context("forkserver")  # one process that has imported everything, and forks
    fork.set_forkserver_preload(["visionzoo.engine.training"])
    folder, moment = tmp_path / "output/killed", random.Random(0)

    def written():
        return max((path.stat().st_mtime_ns for path in folder.glob("[lr]*.pth.tar")), default=0)

    for number in range(8):
        before, start = written(), time.monotonic()
        child = fork.Process(target=run_to_the_end, args=(killed,))
        child.start()
        if number % 4:  # else while it starts
            while written() == before and child.is_alive() and time.monotonic() < start + 60:
                time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.15))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, f"kill {number} came after the end of the run: it was too short"
    train(killed)
    straight = tmp_path / "output/straight"
    for name in ("last.pth.tar", "model_best.pth.tar"):
        assert_same(learned(straight, name), learned(folder, name))
    assert results(folder) == results(straight)
    kept = [{path.name for path in run.glob("*.pth.tar")} for run in (straight, folder)]
    assert kept[0] == kept[1]
    assert not list(folder.glob(".*.tmp"))
