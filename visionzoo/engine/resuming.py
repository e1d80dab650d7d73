"""Claim the folder of a run, and take up the checkpoint that it continues from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.task import TrainingTask
from timm.utils import unwrap_model

from visionzoo.engine import sharding
from visionzoo.engine.checkpoints import CheckpointFolder, read_checkpoint
from visionzoo.engine.checkpoints import progress as progress_of
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import TrainConfig
from visionzoo.engine.optimization import load_optimizer
from visionzoo.engine.options import settings
from visionzoo.engine.ownership import Claim, check_free, check_own, claim
from visionzoo.engine.parallel import Process
from visionzoo.engine.quantization import check_quantizers
from visionzoo.engine.recorded import changed_settings, command_of, compare_classes, recorded_args
from visionzoo.engine.run import SCALER, Place, Run
from visionzoo.engine.weights import shortened
from visionzoo.text import count_of

Found = tuple[Path, dict[str, Any]]  # a checkpoint to continue from, and where it was


def claim_folder(
    config: TrainConfig, process: Process, size: int, metric: str, say: Callable[[str], None]
) -> tuple[Place, Found | None]:
    """Return the run's folder and what to continue from; the first process claims it, and tells the others.

    Raises:
        UserError: another run is there or at work there, or what is there cannot be read.
    """
    found: Found | None = None
    refused: UserError | None = None
    own: Claim | None = None
    if config.run.resume not in ("", "auto"):
        found = Path(config.run.resume), read_checkpoint(config.run.resume)
    try:
        if process.is_primary:
            try:
                own = claim(config.run, config.model.name, size, found)
                found = _found(config, own, found, metric, say)
            except UserError as error:
                refused = error
        if said := process.told(str(refused) if refused else None):
            raise UserError(said) from refused
        folder = Path(str(process.told(str(own.folder) if own else None)))
        path = process.told(str(found[0]) if found else None)
        if path and not found:
            found = Path(path), read_checkpoint(path)
        return Place(folder, _checkpoints(folder, config, metric), own), found
    except BaseException:
        if own is not None:
            own.release()
        raise


def _checkpoints(folder: Path, config: TrainConfig, metric: str) -> CheckpointFolder:
    return CheckpointFolder(folder, keep=config.run.checkpoint_hist, lower_is_better=metric == "loss")


def _found(
    config: TrainConfig, own: Claim, found: Found | None, metric: str, say: Callable[[str], None]
) -> Found | None:
    """Return what to continue from, once the folder is found fit for it."""
    run, folder = config.run, own.folder
    checkpoints = _checkpoints(folder, config, metric)
    if own.note:
        say(own.note)
    if run.resume == "auto":
        found = checkpoints.newest(warn=say)
        if not found:
            say(f"no checkpoint in {folder}: starting from the beginning")
    if found and found[0].parent.resolve() == folder.resolve():
        check_own(folder, *found, ranked_by=metric)
        if run.resume != "auto" and not run.experiment:
            checkpoints.check_newest(*found)
    else:
        check_free(folder)
        if found and not run.experiment:
            say(f"what lies beside {found[0]} stays as it is: continuing in {folder}")
    checkpoints.clear_leftovers()
    return found


def take_up(run: Run, found: Found | None, say: Callable[[str], None]) -> None:
    """Continue from `found`, if anything; then the moving average and the schedule stand where the run stands."""
    state = _restore(run, *found, say) if found else {}
    if run.config.fit.model_ema and state:  # without averages of its own it starts at the weights
        key, task_key = ("state_dict_ema", "task_state_ema")
        if key not in state:
            key, task_key = ("state_dict", "task_state")
        _load(run.task, state[key], state.get(task_key), ema=True)
    if run.config.run.start_epoch is not None:
        run.progress.start_epoch(run.config.run.start_epoch)
    if run.scheduler is not None and run.update:
        run.scheduler.step(run.progress.epoch)
        run.scheduler.step_update(run.update)


def _restore(run: Run, path: Path, state: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    config, progress, model = run.config, run.progress, run.config.model.model
    keeps_optimizer = not config.run.no_resume_opt
    if (arch := state.get("arch", model)) != model:
        raise UserError(f"{path} is a checkpoint of {arch}, this run is of {model}")
    if "state_dict" not in state or "epoch" not in state:
        raise UserError(f"{path} holds no training state; to start from its weights use --initial-checkpoint")
    before, now = command_of(recorded_args(state)), command_of(settings(config))
    if before != now:
        raise UserError(f"{path} is of a run of `visionzoo {before}`, which continues it; this is `visionzoo {now}`")
    compare_classes(state.get("class_names"), run.class_names, str(path))
    done = progress_of(state, path)
    opt = recorded_args(state).get("opt", config.optimizer.opt)
    if opt != config.optimizer.opt and keeps_optimizer:  # torch would load its state all the same
        raise UserError(
            f"{path} was trained by opt={opt!r}, this run has {config.optimizer.opt!r}; or pass --no-resume-opt"
        )
    try:
        check_quantizers(run.student, state["state_dict"], str(path), recorded_args(state).get("quantize"))
        _load(run.task, state["state_dict"], state.get("task_state"))
        if keeps_optimizer:
            shares = sharding.optimizer_shares(state["optimizer"], run.optimizer)
            load_optimizer(config.optimizer, run.optimizer, shares, recorded_args(state))
            if run.scaler is not None and SCALER in state:
                run.scaler.load_state_dict(state[SCALER])
        progress.epoch, progress.batches_done = done
        loss, images, *parts = state.get("losses", progress.losses)
        progress.losses = (float(loss), int(images), {name: float(v) for part in parts for name, v in part.items()})
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; --no-resume-opt loads only its weights") from error
    except (RuntimeError, ValueError, TypeError) as error:
        changes = changed_settings(state, settings(config), run.data_config)
        raise UserError(
            f"{path} does not fit this run of {model}: {shortened(str(error))}"
            + (f"; other than in it: {', '.join(changes)}" if changes else "")
        ) from error
    batches_per_epoch = state.get("batches_per_epoch", progress.batches_done)
    if progress.batches_done < batches_per_epoch != len(run.loader):
        say(
            f"{path} was written in mid-epoch with {count_of(batches_per_epoch, 'batch')} an epoch, now there are "
            f"{len(run.loader)}: the epoch begins anew"
        )
        progress.start_epoch(progress.epoch)
    progress.validated = "metric" in state  # else it was stopped before
    if progress.batches_done >= batches_per_epoch and progress.validated:
        progress.next_epoch()
    run.process.agree(0)  # all have read it
    if run.process.is_primary and path.parent.resolve() == run.folder.resolve():
        for kept in run.checkpoints.continue_from(path, state):
            say(f"what cannot be read is kept as {kept}")
    say(f"continuing from {path} in epoch {progress.epoch}, batch {progress.batches_done}")
    if changes := changed_settings(state, settings(config), run.data_config):
        say(f"other than in {path}, and from here on: {', '.join(changes)}")
    return state


def _load(task: TrainingTask, weights: dict[str, Any], task_state: dict[str, Any] | None, *, ema: bool = False) -> None:
    model = task.get_eval_model(ema=ema)
    assert model is not None
    task.load_checkpoint_state(sharding.shares(weights, unwrap_model(model)), task_state, ema=ema)
