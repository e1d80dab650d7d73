"""Checkpoints: written whole or not at all, read without running code, kept by rank.

A file has the entries of timm's training checkpoints (`epoch`, `arch`, `state_dict`, `state_dict_ema`, `optimizer`,
`amp_scaler`, `args`, `metric`, `version`) and a few of ours.
"""

import argparse
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

import visionzoo.models._checkpoint
from visionzoo.engine.errors import UserError

LAST, BEST, RECOVERY = "last.pth.tar", "model_best.pth.tar", "recovery.pth.tar"


def make_folder(path: Path) -> None:
    """Make a folder unless it is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that appears at `path` only once all of it is on the disk.

    Raises:
        UserError: the file cannot be written (a full disk, say); what was at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save wraps an OSError of the file in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}; what was saved there before is intact") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring a renaming itself to the disk: without this it may be lost in a power cut."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the checkpoint at `path`, tensors on the CPU.

    Raises:
        UserError: there is no file, it is damaged, it would run code when loaded, or it holds no mapping.
    """
    try:
        return dict(visionzoo.models._checkpoint.read_checkpoint(path))
    except ValueError as error:
        raise UserError(str(error)) from error


def recorded_args(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of the training that wrote a checkpoint; none for weights alone."""
    args = state.get("args") or {}
    return dict(vars(args) if isinstance(args, argparse.Namespace) else args)  # timm's own holds a Namespace


class CheckpointFolder:
    """The checkpoints of one run: the last, the best, the `keep` best by metric, and a recovery in mid-epoch."""

    def __init__(self, folder: Path, *, keep: int, lower_is_better: bool) -> None:
        self.folder = folder
        self.keep = max(keep, 1)
        self.sign = -1 if lower_is_better else 1
        self.kept: dict[int, float] = {}  # epoch -> metric
        self.best: tuple[int, float] | None = None  # epoch, metric

    def save(self, state: Mapping[str, Any], epoch: int, metric: float) -> None:
        """Write the checkpoint of an epoch that has ended, and drop the worst beyond `keep`.

        Raises:
            UserError: it cannot be written, or there are weights in it that are no numbers.
        """
        _check_numbers(state)
        is_best = self.best is None or self.sign * metric > self.sign * self.best[1]
        if is_best:
            self.best = (epoch, metric)
        metrics = {**self.kept, epoch: metric}
        ranked = sorted(metrics, key=lambda e: (self.sign * metrics[e], e), reverse=True)
        self.kept = {e: metrics[e] for e in ranked[: self.keep]}

        last = self.folder / LAST
        content = {**state, "metric": metric, "best": self.best, "kept": self.kept}
        write_atomically(last, lambda file: torch.save(content, file))
        if is_best:
            _link(last, self.folder / BEST)
        if epoch in self.kept:
            _link(last, self._path(epoch))
        for dropped in ranked[self.keep :]:
            self._path(dropped).unlink(missing_ok=True)
        (self.folder / RECOVERY).unlink(missing_ok=True)

    def save_recovery(self, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint in mid-epoch; the next `save` removes it. Raises as `save`."""
        _check_numbers(state)
        path = self.folder / RECOVERY
        content = {**state, "best": self.best, "kept": self.kept}
        write_atomically(path, lambda file: torch.save(content, file))
        return path

    def continue_from(self, path: Path, state: Mapping[str, Any]) -> None:
        """Take over the ranking that a checkpoint of this folder holds, and finish a `save` that a kill cut short."""
        self.best = tuple(state["best"]) if state.get("best") else None
        ranking, epoch = state.get("kept", {}), int(state.get("epoch", 0))
        if "metric" in state:  # of an epoch that has ended: its other names may be missing, or an older file's
            targets = [self.folder / BEST] if self.best and self.best[0] == epoch else []
            targets += [self._path(epoch)] if epoch in ranking else []
            for target in targets:
                if not (target.exists() and target.samefile(path)):
                    _link(path, target)
            if path.name == LAST:
                (self.folder / RECOVERY).unlink(missing_ok=True)
        self.kept = {e: metric for e, metric in ranking.items() if self._path(e).exists()}
        for dropped in set(self._epochs()) - set(ranking):
            if dropped < epoch:  # later ones are not this run's to judge
                self._path(dropped).unlink()

    def newest(self, warn: Callable[[str], object]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest sound checkpoint, or None without any; `warn` is told of each damaged one."""
        if not self.folder.is_dir():
            return None
        for leftover in self.folder.glob(".*.tmp"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        numbered = [f"checkpoint-{epoch}.pth.tar" for epoch in sorted(self._epochs(), reverse=True)]
        sound: list[tuple[Path, dict[str, Any]]] = []
        for name in (RECOVERY, LAST, *numbered, BEST):
            if sound and name not in (RECOVERY, LAST):
                break
            if (path := self.folder / name).exists():
                try:
                    sound.append((path, read_checkpoint(path)))
                except UserError as error:
                    warn(f"{error}; looking for an earlier one")
        return max(sound, key=lambda found: progress(found[1]), default=None)

    def _epochs(self) -> list[int]:
        names = (re.fullmatch(r"checkpoint-(\d+)\.pth\.tar", path.name) for path in self.folder.iterdir())
        return [int(match[1]) for match in names if match]

    def _path(self, epoch: int) -> Path:
        return self.folder / f"checkpoint-{epoch}.pth.tar"


def _check_numbers(state: Mapping[str, Any]) -> None:
    """Refuse weights from which no run can go on, so that they take no better ones' place."""
    spoilt = [name for name, value in state.get("state_dict", {}).items() if bool(value.isnan().any())]
    if spoilt:
        raise UserError(
            f"{len(spoilt)} tensors of the model hold NaN, such as {spoilt[0]}; no checkpoint is written of them"
        )


def progress(state: Mapping[str, Any]) -> tuple[int, int]:
    """Return how far the run of a checkpoint had come: its epoch and the batches done in it."""
    return int(state.get("epoch", 0)), int(state.get("batches_done", 0))


def _link(source: Path, target: Path) -> None:
    """Give `source` a second name, by a hard link where the file system has them."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
    except OSError:
        with source.open("rb") as file:
            write_atomically(target, lambda out: shutil.copyfileobj(file, out))
        return
    os.replace(temporary, target)
