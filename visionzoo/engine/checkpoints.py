"""Checkpoints: written whole or not at all, read without running code, kept by rank.

A file has the entries of timm's training checkpoints (`epoch`, `arch`, `state_dict`, `state_dict_ema`, `optimizer`,
`amp_scaler`, `args`, `metric`, `version`) and a few of ours.
"""

import contextlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

import visionzoo.models._checkpoint
from visionzoo.engine.errors import UserError
from visionzoo.text import count_of

LONGEST = 10**9  # epochs or batches, of which no run has more
LAST, BEST, RECOVERY = "last.pth.tar", "model_best.pth.tar", "recovery.pth.tar"
NUMBERED = re.compile(r"checkpoint-(\d+)\.pth\.tar")
LEFTOVER = re.compile(
    r"\.(?:(?:last|model_best|recovery|checkpoint-\d+)\.pth\.tar|summary\.csv|curves\.png|(?:args|environment)\.yaml)\.\d+\.tmp"
)  # of a writer that was killed


def make_folder(path: Path) -> None:
    """Make a folder unless it is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Make a folder unless it is there; after an error, what was made and is empty is gone again.

    Raises:
        UserError: it cannot be made.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    try:
        yield
    except BaseException:
        if made:
            inside = [folder for folder in path.rglob("*") if folder.is_dir()]
            for folder in (*sorted(inside, reverse=True), *made):
                with contextlib.suppress(OSError):  # it holds something
                    folder.rmdir()
        raise


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
        with contextlib.suppress(OSError):  # where nothing can be removed either, the message is of the writing
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


def checkpoint_names(folder: Path) -> list[str]:
    """Return the names of the checkpoints in a folder, readable or not, those of timm's train script too.

    Raises:
        UserError: the folder is there and cannot be looked into.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot look into the folder {folder}: {error.strerror}") from error
    return [name for name in names if name in (LAST, BEST, RECOVERY) or NUMBERED.fullmatch(name)]


class CheckpointFolder:
    """The checkpoints of one run: the last, the best, the `keep` best by metric, and a recovery in mid-epoch."""

    def __init__(self, folder: Path, *, keep: int, lower_is_better: bool) -> None:
        self.folder = folder
        self.keep = max(keep, 1)
        self.sign = -1 if lower_is_better else 1
        self.kept: dict[int, float] = {}  # epoch -> metric
        self.best: tuple[int, float] | None = None  # epoch, metric
        self.unreadable: list[str] = []

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
        with changing(self.folder):
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

    def continue_from(self, path: Path, state: Mapping[str, Any]) -> list[Path]:
        """Take over the ranking that a checkpoint of this folder holds, and finish a `save` that a kill cut short.

        Checkpoints that `newest` could not read keep their content under another name; these names are returned.
        """
        ranking = {int(epoch): float(metric) for epoch, metric in dict(state.get("kept") or {}).items()}
        epoch = int(state.get("epoch", 0))
        self.best = (int(state["best"][0]), float(state["best"][1])) if state.get("best") else None
        with changing(self.folder):
            aside = [_put_aside(self.folder / name) for name in self.unreadable]
            self.unreadable = []
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
        return aside

    def newest(self, warn: Callable[[str], object]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest sound checkpoint, or None where there is no checkpoint; `warn` is called for damaged ones.

        Raises:
            UserError: there are checkpoints, and none of them can be read.
        """
        names = checkpoint_names(self.folder)
        numbered = [f"checkpoint-{epoch}.pth.tar" for epoch in sorted(self._epochs(), reverse=True)]
        sound: list[tuple[Path, dict[str, Any]]] = []
        complaints: dict[str, str] = {}
        for name in (RECOVERY, LAST, *numbered, BEST):
            if sound and name not in (RECOVERY, LAST):
                break
            if name in names:
                try:
                    state = read_checkpoint(self.folder / name)
                    progress(state, self.folder / name)
                    sound.append((self.folder / name, state))
                except UserError as error:
                    complaints[name] = str(error)
        if complaints and not sound:
            first = next(iter(complaints.values()))
            raise UserError(
                f"none of {count_of(len(complaints), 'checkpoint')} in {self.folder} can be read, and no new "
                f"run is started over them; the first: {first} Or name another --experiment"
            )
        self.unreadable = list(complaints)
        for complaint in complaints.values():
            warn(f"{complaint} Looking for an earlier one")
        return max(sound, key=lambda found: progress(found[1], found[0]), default=None)

    def check_newest(self, path: Path, state: Mapping[str, Any]) -> None:
        """Refuse to go back to an earlier checkpoint, which would replace what came after it.

        Raises:
            UserError: the last one of the folder has come further than this one.
        """
        last = self.folder / LAST
        if not last.exists() or last.samefile(path):
            return
        try:
            furthest = progress(read_checkpoint(last), last)
        except UserError:
            self.unreadable = [LAST]
            return
        if furthest > (done := progress(state, path)):
            raise UserError(
                f"{path} is of epoch {done[0]}, and {last} of epoch {furthest[0]} would be replaced: continue "
                "from that, or under another --experiment; --output and --experiment that name this folder replace it"
            )

    def clear_leftovers(self) -> None:
        """Remove what a writer of this run's checkpoints left when it was killed; no other may be writing here."""
        with changing(self.folder):
            for path in self.folder.iterdir():
                if LEFTOVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _epochs(self) -> list[int]:
        matches = (NUMBERED.fullmatch(name) for name in checkpoint_names(self.folder))
        return [int(match[1]) for match in matches if match]

    def _path(self, epoch: int) -> Path:
        return self.folder / f"checkpoint-{epoch}.pth.tar"


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Tell what the file system refuses as a UserError.

    Raises:
        UserError: it refuses a change in `folder`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot change {error.filename or folder}: {error.strerror}") from error


def _put_aside(path: Path) -> Path:
    """Rename a file that cannot be read and that the run would replace; return its new name."""
    number, target = 0, path.with_name(f"{path.name}.unreadable")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.unreadable-{number}")
    with changing(path.parent):
        path.rename(target)
    return target


def _check_numbers(state: Mapping[str, Any]) -> None:
    """Refuse weights from which no run can continue, so that they do not replace better ones."""
    spoilt = [name for name, value in state.get("state_dict", {}).items() if bool(value.isnan().any())]
    if spoilt:
        raise UserError(
            f"{count_of(len(spoilt), 'tensor of the model holds', 'tensors of the model hold')} NaN, such as "
            f"{spoilt[0]}; no checkpoint is written"
        )


def is_ours(state: Mapping[str, Any]) -> bool:
    """Whether a run of ours wrote a checkpoint, not timm's script, whose files have the same names."""
    return "batches_per_epoch" in state and "kept" in state


def progress(state: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Return how far the run of a checkpoint had come: its epoch and the batches done in it.

    Raises:
        UserError: these are no such numbers, or the best metric is none, and no later one would be better.
    """
    for name in ("epoch", "batches_done", "batches_per_epoch"):
        if not (isinstance(number := state.get(name, 0), int) and 0 <= number <= LONGEST):
            raise UserError(f"{path} records {name}={number!r}, expected 0 to {LONGEST:,}; its record is damaged.")
    if state.get("best") and not math.isfinite(state["best"][1]):
        raise UserError(f"{path} records best={state['best']!r}, expected epoch and number; its record is damaged.")
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
