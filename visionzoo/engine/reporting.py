"""What a run shows and writes: a bar, a line an epoch, CSV, TensorBoard, Weights & Biases, curves as a picture."""

import contextlib
import csv
import io
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from visionzoo.engine.checkpoints import write_atomically
from visionzoo.engine.errors import UserError, require
from visionzoo.engine.flags import RunConfig
from visionzoo.engine.outputs import free_path
from visionzoo.engine.profiling import peak_memory

CURVES, SUMMARY, LOG = "curves.png", "summary.csv", "log.txt"


class Reporter:
    """The log of one run; made in the primary process only."""

    def __init__(
        self,
        folder: Path,
        run: RunConfig,
        *,
        record: Mapping[str, Any],
        device: torch.device,
        first_epoch: int,
        first_update: int,
    ) -> None:
        self.folder = folder
        self._device = device
        self._tqdm = require("tqdm").tqdm
        rows, note = read_rows(folder / SUMMARY)
        self.rows = [row for row in rows if int(row["epoch"]) < first_epoch]
        if note:
            self.say(note)
        require("matplotlib")  # now, not after days of training
        require("tensorboard")
        writer = require("torch.utils.tensorboard").SummaryWriter
        self._board = writer(str(folder), purge_step=first_update or None)
        self._wandb = _start_wandb(folder, run, record) if run.log_wandb else None
        self._bar: Any = None
        self._log_interval = run.log_interval
        self._last_step: tuple[int, int, float] | None = None  # update, images and time of the last entry

    def start_bar(self, total: int, done: int) -> None:
        """Show a bar over the images of the whole run, with images/s and the time left."""
        quiet = not sys.stderr.isatty()  # into a file, a line now and then
        self._bar = self._tqdm(
            total=total,
            initial=done,
            unit=" img",
            unit_scale=True,
            mininterval=30 if quiet else 0.2,
            dynamic_ncols=True,
        )

    def advance(self, images: int) -> None:
        """Move the bar."""
        self._bar.update(images)

    def step(self, update: int, epoch: int, *, losses: Mapping[str, float], lr: float) -> None:
        """Show the loss of an update, and log it and its parts every --log-interval and after the first."""
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix_str(f"loss {losses['loss']:.4g}, lr {lr:.3g}", refresh=False)
        if self._last_step is None or update - self._last_step[0] >= self._log_interval:
            now = (update, self._bar.n, time.perf_counter())
            values = {**{f"train/{name}": loss for name, loss in losses.items()}, "train/lr": lr}
            if self._last_step is not None:
                images, seconds = now[1] - self._last_step[1], now[2] - self._last_step[2]
                values["train/images_per_second"] = images / seconds
            self._last_step = now
            values |= {f"train/{name}": value for name, value in peak_memory(self._device).items()}
            self._log(values, update)

    def epoch(self, update: int, row: dict[str, float]) -> None:
        """Log the values of an epoch and say them in a line."""
        self.rows.append({name: f"{value:.7g}" for name, value in row.items()})
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.folder / SUMMARY, lambda file: file.write(text.getvalue().encode()))
        self._log({f"epoch/{name}": value for name, value in row.items()}, update)
        self.say(f"epoch {row['epoch']}: " + ", ".join(f"{k} {v:.5g}" for k, v in row.items() if k != "epoch"))

    def say(self, text: str) -> None:
        """Print a line above the bar, and keep it."""
        self.keep(text)
        self._tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def keep(self, text: str) -> None:
        """Add a line to log.txt; where the disk is full it is the checkpoint's place to complain."""
        with contextlib.suppress(OSError), (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def draw_curves(self) -> None:
        """Draw curves.png."""
        if self.rows:
            draw_curves(self.rows, self.folder / CURVES)

    def close(self) -> None:
        """Close the bar and the logs."""
        if self._bar is not None:
            self._bar.close()
        try:
            self._board.close()
        except OSError as error:  # a full disk: what ended the run must not be hidden by it
            self.say(f"the TensorBoard log in {self.folder} is cut short: {error.strerror}")
        if self._wandb is not None:
            self._wandb.finish()

    def _log(self, values: dict[str, float], update: int) -> None:
        try:
            for name, value in values.items():
                self._board.add_scalar(name, value, update)
        except OSError as error:
            raise UserError(f"cannot write the TensorBoard log in {self.folder}: {error.strerror}") from error
        if self._wandb is not None:
            self._wandb.log(values, step=update)


def read_rows(path: Path) -> tuple[list[dict[str, str]], str]:
    """Return the rows of a summary.csv, and words on one that is no longer such a table: it gets another name."""
    if not path.exists():
        return [], ""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a byte-order mark
            rows = list(csv.DictReader(file, strict=True))
        for row in rows:
            int(row["epoch"])
            [float(value) for value in row.values() if value]
        if rows or path.stat().st_size < 3 or path.read_text(encoding="utf-8-sig").startswith("epoch"):
            return rows, ""
        reason = "it has no column epoch"
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    aside = free_path(path)
    path.rename(aside)
    return [], f"{path} was changed and can no longer be read ({reason}): it is kept as {aside}, the table begins anew"


def _start_wandb(folder: Path, run: RunConfig, record: Mapping[str, Any]) -> Any:
    wandb = require("wandb", extra="wandb")
    try:
        return wandb.init(
            dir=str(folder),
            project=run.wandb_project,
            name=folder.name,
            config=dict(record),
            tags=run.wandb_tags,
            id=run.wandb_resume_id or None,
            resume="must" if run.wandb_resume_id else None,
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases cannot start: {error} (--log-wandb; WANDB_MODE=offline logs without a connection)"
        ) from error


def insert_between(text: str, begin: str, end: str, content: str) -> str:
    """Replace what stands between two marks of a text.

    Raises:
        UserError: a mark is missing.
    """
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise UserError(f"expected the lines {begin!r} and {end!r} around the place for what is written")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end, 1)[1]}"


def write_between(path: Path, begin: str, end: str, content: str) -> None:
    """Put `content` between two marks of a text file.

    Raises:
        UserError: a mark is missing, or the file cannot be read or written.
    """
    try:
        text = insert_between(path.read_text(encoding="utf-8"), begin, end, content)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    write_atomically(path, lambda file: file.write(text.encode()))


def draw_curves(rows: list[dict[str, str]], path: Path) -> None:
    """Draw the losses and the accuracy of the rows of summary.csv against the epoch."""
    require("matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    metrics = (("train_loss", "eval_loss"), ("eval_top1", "eval_top5", "eval_map"))
    for axes, names, unit in zip(figure.subplots(1, 2), metrics, ("loss", "%"), strict=True):
        for name in names:
            points = [(int(row["epoch"]), float(row[name])) for row in rows if row.get(name)]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
