"""A run owns its folder: no second start writes there meanwhile, and what others have written there stays."""

import contextlib
import itertools
import os
import weakref
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from timm.models import safe_model_name

from visionzoo.engine.checkpoints import checkpoint_names, is_ours, make_folder
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import RunConfig

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

MARK = "environment.yaml"  # the first file that a run of ours writes
WRITTEN = ("args.yaml", "summary.csv", "curves.png")  # and would replace

_held: set[int] = set()


def _forget() -> None:
    """Close a parent's locks in a forked process: a loading process may outlive it for seconds."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Claim:
    """The right of one process to write to a folder, until `release` or the end of the process, be it by a kill.

    It is a lock on the folder itself and leaves nothing behind.

    Args:
        folder: made unless it is there.

    Attributes:
        folder: as given.
        note: what to say where the file system or the operating system has no locks, else nothing.

    Raises:
        UserError: another process has it, or the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.note = ""
        self._made = False
        descriptor = None
        while descriptor is None:
            self._made |= not folder.exists()
            make_folder(folder)
            if fcntl is None:
                self.note = _no_locks(folder)
                return
            descriptor = self._lock()
        _held.add(descriptor)
        self._free = weakref.finalize(self, _release, descriptor)

    def _lock(self) -> int | None:
        """Return a descriptor of the locked folder, or None where the folder was removed meanwhile."""
        try:
            descriptor = os.open(self.folder, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot open the folder {self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(
                f"another run is at work in {self.folder}: wait for its end, or name another --experiment"
            ) from error
        except OSError:  # network file systems may have none
            self.note = _no_locks(self.folder)
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(self.folder)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)
        return None

    def release(self) -> None:
        """Give the folder back, and remove it where this made it and nothing was put into it."""
        if self._made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        if fcntl is not None:
            self._free()


def claim(run: RunConfig, model: str, size: int, found: tuple[Path, Mapping[str, Any]] | None) -> Claim:
    """Claim the folder of a run: the one that the user names, else that of what it continues from, else a new one.

    Args:
        run: what the user says of it.
        model: its name, for that of a new folder.
        size: side of its images, likewise.
        found: the path and content of the checkpoint that --resume names.

    Raises:
        UserError: another process has it, or it cannot be made.
    """
    if run.resume == "auto" and not run.experiment:
        raise UserError("--resume auto looks into the folder of --experiment NAME; give the name, or --resume FILE")
    output = Path(run.output or "output/train")
    if run.experiment:
        return Claim(output / run.experiment)
    if found and not run.output and is_ours(found[1]):
        path = found[0]
        others = [name for name in (*checkpoint_names(path.parent), *WRITTEN) if (path.parent / name).exists()]
        if has_run(path.parent) or set(others) <= {path.name}:
            return Claim(path.parent)
    return _claim_new(output / f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(model)}-{size}")


def _claim_new(folder: Path) -> Claim:
    """Claim a folder that is not there yet: `folder`, or where it is taken the first free one of -1, -2, ..."""
    for number in itertools.count():
        candidate = folder.with_name(f"{folder.name}-{number}") if number else folder
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the folder {candidate}: {error.strerror}") from error
        claim = Claim(candidate)
        claim._made = True
        return claim
    raise AssertionError("not reached")


def check_free(folder: Path) -> None:
    """Refuse a folder that a run is not to begin in: one that holds a run, or files that it would replace.

    Raises:
        UserError: it is such a folder.
    """
    if checkpoint_names(folder):
        raise UserError(f"{folder} holds a run already; continue it by --resume auto, or name another --experiment")
    if not has_run(folder) and (theirs := [name for name in WRITTEN if (folder / name).exists()]):
        raise UserError(
            f"{folder} holds {', '.join(theirs)}, which no run of this tool wrote and this one would replace; name "
            "another --experiment"
        )


def check_own(folder: Path, path: Path, state: Mapping[str, Any], *, ranked_by: str) -> None:
    """Refuse to continue in a folder from a checkpoint in it whose files are not this run's to rank and to delete.

    Raises:
        UserError: the checkpoint is of another tool, or the ranking is by another metric.
    """
    if not is_ours(state):
        raise UserError(
            f"{path} was not written by this tool, and its folder is not this run's to write to; continue from it in "
            f"another one: --resume {path} with another --experiment or --output"
        )
    before = state.get("ranked_by", ranked_by)
    if before != ranked_by:
        raise UserError(
            f"the best checkpoints in {folder} are ranked by {before}, this run would rank them by {ranked_by} "
            "(--eval-metric, --val-split); give what was given before, or continue under another --experiment"
        )


def has_run(folder: Path) -> bool:
    """Whether a run of ours has begun in the folder."""
    return (folder / MARK).exists()


def _release(descriptor: int) -> None:
    if descriptor in _held:  # else this is a forked process
        _held.discard(descriptor)
        os.close(descriptor)


def _no_locks(folder: Path) -> str:
    return f"no locks are to be had in {folder}: see to it yourself that no second run is started there"
