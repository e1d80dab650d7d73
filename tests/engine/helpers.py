"""Images, files and a small model for the tests of the engine and of its commands."""

import csv
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import visionzoo.models._checkpoint
from visionzoo.engine.checkpoints import read_checkpoint
from visionzoo.engine.options import settings
from visionzoo.engine.restoring import Trained, restore
from visionzoo.engine.trained_flags import EvalConfig, PredictConfig

ROOT = Path(__file__).parents[2]
COLOURS = {"blue": (30, 30, 220), "green": (30, 220, 30), "red": (220, 30, 30)}
TINY = {
    "model": "zoo_biformer_t",  # has batch norm, dropped paths and attention
    "model_kwargs": {"depths": [1, 1], "embed_dims": [8, 16], "topks": [1, -2], "regions": 2},
    "img_size": 32,
    "batch_size": 8,
    "epochs": 2,
    "warmup_epochs": 0,
    "opt": "adamw",
    "lr": 1e-2,
    "workers": 0,
    "device": "cpu",
    "drop_path": 0.1,
    "checkpoint_hist": 2,
}
UPDATES = 4  # of an epoch: 36 images in batches of 8
TINY_FLAGS = ["--img-size", "32", "-b", "4", "--warmup-epochs", "0", "--lr", "1e-3", "--device", "cpu", "-j", "0"]


def write_images(root: Path, per_class: int, seed: int, size: int = 40) -> None:
    """Write noisy images of each color in a folder each."""
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.clip(random.normal(colour, 40, (size, size, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def write_splits(root: Path, val_per_class: int = 2) -> None:
    """Write 12 images to train and a few to validate on."""
    write_images(root / "train", per_class=4, seed=0)
    write_images(root / "val", per_class=val_per_class, seed=1)


def truncate(path: Path, keep: float = 0.5) -> None:
    """Cut a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def write_pickle_that_runs(path: Path, witness: Path) -> None:
    """Write a torch file that makes the folder `witness` when it is unpickled carelessly."""

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(witness),)

    torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": Code()}, path)


def run_tool(name: str, *argv: str) -> int:
    """Run tools/NAME.py with arguments and return its exit code."""
    before = sys.argv
    sys.argv = [f"tools/{name}.py", *argv]
    try:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = before
    return 0


def count_reads(monkeypatch: Any) -> list[Any]:
    """The files that are read as checkpoints from now on, in a list that grows."""
    reads, read = [], visionzoo.models._checkpoint.read_checkpoint
    monkeypatch.setattr("visionzoo.models._checkpoint.read_checkpoint", lambda path: reads.append(path) or read(path))
    return reads


def restored(parser: Callable, *flags: str) -> Trained:
    """The model that `visionzoo eval`, `predict` or `export` is given by flags."""
    config = parser().parse(flags)
    if isinstance(config, EvalConfig):
        weights, reading = config.result, config.data
    elif isinstance(config, PredictConfig):
        weights, reading = config.picture, config.picture.reading
    else:
        weights, reading = config.source.weights, config.source
    return restore(config.model, config.input, weights, settings(reading))


class Child:
    """A tool in a process of its own, whose group is that of a terminal's job.

    Args:
        log: file for what it prints.
        name: as `run_tool` takes it, with its arguments.
    """

    def __init__(self, log: Path, name: str, *argv: str) -> None:
        self.log = log
        command = [sys.executable, str(ROOT / f"tools/{name}.py"), *argv]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("w") as file:  # not forked from this process: what its threads hold would stay held
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Wait until something has happened, or the process has ended."""
        while self.process.poll() is None and not happened():
            time.sleep(0.02)

    def stop(self, number: int, *, to: str = "process") -> tuple[int, str]:
        """Send a signal to the "process", its "group" as a terminal does, or also its "children" as schedulers do.

        Fails where a process of its group, or a child, is left.

        Returns:
            Its exit code and its last words.
        """
        pid = self.process.pid
        children = []
        if to == "children":
            children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            assert children, self.log.read_text()
            for child in children:
                os.kill(child, number)
        (os.killpg if to == "group" else os.kill)(pid, number)
        code = self.process.wait(120)
        left = [child for child in children if Path(f"/proc/{child}").exists()]
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            assert not left, self.log.read_text()
            return code, self.log.read_text()
        raise AssertionError(f"processes are left: {self.log.read_text()}")


def rows(folder: Path) -> list[dict[str, str]]:
    """Read summary.csv of a run."""
    with (folder / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def results(folder: Path) -> list[dict[str, str]]:
    """Read summary.csv of a run without what depends on the machine."""
    timed = ("images_per_second", "seconds", "waiting_seconds", "peak_process_memory_mib")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows(folder)]


def assert_same(one: dict, two: dict) -> None:
    """Two checkpoints hold the same numbers, bit for bit."""
    assert one.keys() == two.keys()
    for key in one:
        if isinstance(one[key], dict):
            assert_same(one[key], two[key])
        elif isinstance(one[key], torch.Tensor):
            assert torch.equal(one[key], two[key]), key
        else:
            assert one[key] == two[key], key


def learned(folder: Path, name: str = "last.pth.tar") -> dict:
    """What a run has learned so far, from its checkpoint."""
    state = read_checkpoint(folder / name)
    keys = ("state_dict", "state_dict_ema", "optimizer", "amp_scaler", "epoch", "losses", "metric", "best", "kept")
    return {key: state[key] for key in keys if key in state}
