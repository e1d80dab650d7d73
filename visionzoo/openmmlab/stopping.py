"""Signals end a training between two steps, with a checkpoint, from which it continues where it was."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.dist import barrier, get_backend, get_rank, get_world_size, is_distributed
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from visionzoo.engine.errors import Interrupted, UserError
from visionzoo.engine.interruption import StopSignals
from visionzoo.engine.parallel import Process

# what a checkpoint's message hub says, beside the weights
BATCHES_DONE = "batches_done"  # of the epoch that was stopped
VALIDATION_DUE = "validation_due"  # whether the validation after the last step was stopped


class StopHook(Hook):
    """Ends a training by a signal: after an update or a batch of validation, in all processes, with a checkpoint.

    Raises:
        Interrupted: a signal came; the checkpoint is named.
        UserError: the checkpoint cannot be written.
    """

    priority = "LOWEST"  # after the schedule, the moving average and the checkpoint of the same step

    def __init__(self, stop: StopSignals) -> None:
        self.stop = stop

    def before_train(self, runner: Runner) -> None:
        """Make up for a validation that was stopped."""
        if runner.message_hub.runtime_info.pop(VALIDATION_DUE, False) and runner.val_loop is not None:
            runner.val_loop.run()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Stop where an update is done: gradients that accumulate are in no checkpoint."""
        if runner.optim_wrapper.should_update():
            self._check(runner, runner.iter + 1, {BATCHES_DONE: batch_idx + 1})

    def before_val_epoch(self, runner: Runner) -> None:
        """See whether all processes have as many batches, so that they can be asked after each."""
        count = len(runner.val_loop.dataloader)
        agree = self.stop.process.agree
        self._together = agree(count) == -agree(-count)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Stop; the validation begins anew when the training continues."""
        if self._together:
            self._check(runner, runner.iter, {VALIDATION_DUE: True})

    def _check(self, runner: Runner, iteration: int, notes: dict[str, Any]) -> None:
        try:
            self.stop.check()
        except Interrupted as error:
            name = f"stopped_iter_{iteration}.pth"
            path = Path(runner.work_dir, name)
            for key, value in notes.items():
                runner.message_hub.update_info(key, value)
            for hook in runner.hooks if VALIDATION_DUE in notes else []:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # trained weights and averaged ones change places for a validation
            try:
                runner.save_checkpoint(runner.work_dir, name, meta={"epoch": runner.epoch, "iter": iteration})
                if runner.rank == 0:
                    Path(runner.work_dir, "last_checkpoint").write_text(str(path))  # where --resume looks
            except (OSError, RuntimeError) as failure:
                raise UserError(f"cannot write {path}: {failure}; {LAST_GOOD}") from failure
            barrier()  # torchrun ends all processes as soon as one has ended
            said = f"saved {path}; training continues from it by --resume" if runner.rank == 0 else ""
            raise Interrupted(error.signum, said) from None


LAST_GOOD = "training continues from the last checkpoint by --resume"


class GoingOnTrainLoop(EpochBasedTrainLoop):
    """mmengine's loop over epochs, which continues in the middle of the one that was stopped."""

    def run_epoch(self) -> None:
        """Train what is left of the epoch: the batches that are done are read and skipped."""
        done = self.runner.message_hub.runtime_info.pop(BATCHES_DONE, 0)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for index, batch in islice(enumerate(self.dataloader), done, None):
            self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


@contextlib.contextmanager
def stopping_between_steps(runner: Runner) -> Iterator[None]:
    """Let signals end a training as `StopHook` does; a second one ends it at once.

    Raises:
        Interrupted: a signal came; the message says what was saved.
    """
    several = is_distributed()
    control = torch.distributed.new_group(backend="gloo") if several and get_backend() != "gloo" else None
    stop = StopSignals(Process(torch.device("cpu"), get_rank(), get_world_size(), several, control))
    runner.register_hook(StopHook(stop))
    try:
        with stop:
            yield
    except Interrupted as error:
        if stop.cut_short:
            said = f"the second signal came in the middle of a step, nothing saved; {LAST_GOOD}"
            raise Interrupted(error.signum, said) from error
        raise
    except RuntimeError as error:
        if stop.received is None:
            raise
        raise Interrupted(stop.received, f"nothing saved; {LAST_GOOD}") from error  # peers got it too


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Let SIGTERM, by which schedulers end jobs, end an evaluation as Ctrl-C does: its loading processes end with it.

    Raises:
        Interrupted: it came.
    """
    process = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() != process:  # a loading process that has not set its own handlers yet
            os._exit(128 + number)
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
