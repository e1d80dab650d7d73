"""Whole trainings by `visionzoo train`, on one GPU or several, that load their images from files.

The images are JPEGs of 320x256 pixels, 512 of them under 100 batches of names, cropped, resized and flipped by loading
processes, as many as the machine has cores. What counts are the epochs after the first, in which things are compiled
and recorded.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from visionzoo.benchmark.cases import Absent, Run, Settings
from visionzoo.text import count_of

CLASSES, DISTINCT, BATCHES, EPOCHS, SIZE = 8, 512, 100, 3, (320, 256)
FAST = ("--amp", "--amp-dtype", "bfloat16", "--cuda-graphs", "--torchcompile")


def prepare_training(settings: Settings, model: str, batch: int, gpus: int) -> Run:
    """Return a run that trains and says what `batch` images took in each epoch but the first, in ms.

    Raises:
        Absent: if the machine has fewer GPUs.
    """
    there = torch.cuda.device_count() if settings.device.type == "cuda" else 0
    if there < gpus:
        raise Absent(f"{count_of(gpus, 'GPU')} needed, torch sees {there} here")

    def call() -> list[float]:
        with TemporaryDirectory() as folder:
            write_images(Path(folder), batch * BATCHES * gpus)
            command = training_command(Path(folder), model, batch, gpus, FAST)
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"visionzoo train: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            return batch_ms(Path(folder), batch)

    return Run(call)


def training_command(folder: Path, model: str, batch: int, gpus: int, flags: Sequence[str] = ()) -> list[str]:
    """Return the command that trains on the images of a folder, `batch` in a process, a process a GPU."""
    start = [sys.executable, "-m"]
    if gpus > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m"]
    workers = max(1, (os.cpu_count() or 1) // gpus)
    return [
        *(*start, "visionzoo", "train", "--model", model, "--data-dir", str(folder), "-b", str(batch)),
        *("--epochs", str(EPOCHS), "--warmup-epochs", "0", "--opt", "adamw", "--lr", "1e-4", "-j", str(workers)),
        *("--pin-mem", "--no-curves", "--output", str(folder), "--experiment", "run", *flags),
    ]


def write_images(folder: Path, count: int, distinct: int = DISTINCT) -> None:
    """Write smooth random images to train on, `distinct` files under `count` names, and a few to validate on."""
    random = np.random.default_rng(0)
    for split, number in (("train", count), ("val", CLASSES)):
        for i in range(number):
            path = folder / split / str(i % CLASSES) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i < distinct:
                small = Image.fromarray(random.integers(0, 256, (32, 40, 3), dtype=np.uint8))
                small.resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
            else:
                first = i % distinct
                os.link(folder / split / str(first % CLASSES) / f"{first}.jpg", path)


def batch_ms(folder: Path, batch: int) -> list[float]:
    """Read from a run's summary.csv what `batch` images took in each epoch but the first."""
    with (folder / "run" / "summary.csv").open(newline="", encoding="utf-8") as file:
        rates = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    return [1e3 * batch / rate for rate in rates[1:]]
