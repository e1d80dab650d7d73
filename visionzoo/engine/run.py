"""What a training run consists of, built from its configuration, and how it is saved and taken up again."""

import dataclasses
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.optim import Optimizer

from visionzoo.engine import sharding
from visionzoo.engine.auxiliary import AuxiliaryTask
from visionzoo.engine.checkpoints import (
    LAST,
    RECOVERY,
    CheckpointFolder,
    make_folder,
    read_checkpoint,
    write_atomically,
)
from visionzoo.engine.checkpoints import (
    progress as progress_of,
)
from visionzoo.engine.data import (
    check_labels,
    class_names,
    end_loading,
    eval_loader,
    open_train_and_val,
    resolve_num_classes,
    train_loader,
)
from visionzoo.engine.distillation import make_task, teacher_name
from visionzoo.engine.environment import environment
from visionzoo.engine.errors import UserError, require
from visionzoo.engine.flags import TrainConfig
from visionzoo.engine.freezing import LayerFreezing
from visionzoo.engine.images import seed_everything
from visionzoo.engine.models import (
    build_model,
    data_config,
    load,
    prepare_compiler,
    try_images,
)
from visionzoo.engine.optimization import (
    learning_rate,
    load_optimizer,
    make_optimizer,
    make_scheduler,
    ranking_metric,
    total_batch,
)
from visionzoo.engine.options import changed, settings
from visionzoo.engine.ownership import Claim, check_free, check_own, claim
from visionzoo.engine.parallel import Process, starter
from visionzoo.engine.probing import choose_head, freeze
from visionzoo.engine.recorded import changed_settings, compare_classes, recorded_args
from visionzoo.engine.regularization import regularize_attention
from visionzoo.engine.reporting import Reporter
from visionzoo.graphs import make_capturable
from visionzoo.replicas import Replicas
from visionzoo.text import count_of

SCALER = "amp_scaler"  # timm's name of its state in a checkpoint


Found = tuple[Path, dict[str, Any]]  # a checkpoint to continue from, and where it was


@dataclass(slots=True)
class Progress:
    """How far a run has come: all of it that changes.

    Attributes:
        epoch, batches_done: the epoch in progress and the batches done in it.
        losses: sum of the losses of these batches' images, their number, and the sums of the losses' parts by name.
        validated: whether there is a checkpoint with metric of just this place.
    """

    epoch: int = 0
    batches_done: int = 0
    losses: tuple[float, int, dict[str, float]] = (0.0, 0, {})
    validated: bool = False

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.start_epoch(self.epoch + 1)

    def start_epoch(self, epoch: int) -> None:
        """Stand at the beginning of an epoch."""
        self.epoch, self.batches_done, self.losses = epoch, 0, (0.0, 0, {})


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of a run.

    Attributes:
        folder: where it writes.
        checkpoints: those that are there.
        claim: the right to write there, in the primary process only.
    """

    folder: Path
    checkpoints: CheckpointFolder
    claim: Claim | None = None

    def release(self) -> None:
        """Give the folder back to others."""
        if self.claim is not None:
            self.claim.release()


@dataclass(slots=True)
class Notes:
    """What is printed before a run has its log."""

    process: Process
    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Print a line, in the primary process, and keep it for the log."""
        if self.process.is_primary:
            self.lines.append(text)
            print(text, flush=True)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Parts:
    """What is trained, and on what.

    Attributes:
        train_set, val_set: its images; None to validate on nothing.
        class_names: in the order of their numbers, None where the data set has none.
        data_config: input size, mean, std, crop and interpolation.
        loader, val_loader: of the images.
        task: timm's, with the model.
        metric: what the best checkpoint is best in: `loss`, or a name of a validation's metrics.
        freezing: which layers are frozen when; None for none.
    """

    train_set: Any
    val_set: Any
    class_names: list[str] | None
    data_config: dict[str, Any]
    loader: Any
    val_loader: Any
    task: TrainingTask
    metric: str
    freezing: LayerFreezing | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Run(Parts):
    """Model, data, optimizer, schedule and folder of one training; only its progress changes.

    Attributes:
        config: what it was given, with the number of classes and the head of the model.
        process: where it runs.
        optimizer, scheduler, scaler: of the updates; None for no schedule, and without a loss scale.
        num_epochs: with cool-down.
        place: where it writes.
        progress: how far it has come.
        replicas: what joins several processes that train by CUDA graphs.
        reporter: the log, in the primary process only.
    """

    config: TrainConfig
    process: Process
    optimizer: Optimizer
    scheduler: Scheduler | None
    scaler: torch.amp.GradScaler | None
    num_epochs: int
    place: Place
    progress: Progress
    replicas: Replicas | None = None
    reporter: Reporter | None = None

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.place.folder

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The checkpoints in its folder."""
        return self.place.checkpoints

    @property
    def updates_per_epoch(self) -> int:
        """The updates of an epoch, of several batches each where gradients are accumulated."""
        return updates(len(self.loader), self.config)

    @property
    def update(self) -> int:
        """The updates done so far."""
        return self.progress.epoch * self.updates_per_epoch + updates(self.progress.batches_done, self.config)

    @property
    def at_max_steps(self) -> bool:
        """Whether the step limit is reached."""
        limit = self.config.run.max_steps
        return limit is not None and self.update >= limit

    @property
    def finished(self) -> bool:
        """Whether all epochs, or the step limit, are done and validated."""
        return self.progress.epoch >= self.num_epochs or (self.at_max_steps and self.progress.validated)

    @property
    def trainable(self) -> nn.Module:
        """The model as it is trained: compiled, and wrapped for several processes."""
        return trained_module(self.task)

    @property
    def lr(self) -> float:
        """The learning rate now, averaged over the parameter groups."""
        groups = self.optimizer.param_groups
        return sum(group["lr"] for group in groups) / len(groups)

    def close(self) -> None:
        """Give the folder back to others, and end the loading processes."""
        self.place.release()
        end_loading(self.loader)
        end_loading(self.val_loader)

    def say(self, text: str) -> None:
        """Print a line and log it, in the primary process."""
        if self.reporter:
            self.reporter.say(text)

    def resume_command(self, checkpoint: str = LAST) -> str:
        """Return the command that continues from a checkpoint of this run."""
        tool, *words = sys.argv
        for index, word in reversed(list(enumerate(words))):
            if word.startswith("--resume"):
                del words[index : index + (1 if "=" in word else 2)]
        return f"{starter(tool)} {shlex.join([*words, '--resume', str(self.folder / checkpoint)])}"

    def last_good(self) -> str:
        """Return which checkpoint of this run there is and the command that continues from it."""
        found = [name for name in (RECOVERY, LAST) if (self.folder / name).exists()]
        if not found:
            return "There is no checkpoint yet"
        return f"The last good checkpoint: {self.folder / found[0]}; continue with: {self.resume_command(found[0])}"

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint holds, in plain types and tensors; all processes call this."""
        state = {
            "version": 2,  # timm's number for: `epoch` is the one that ended
            "epoch": self.progress.epoch,
            "batches_done": self.progress.batches_done,
            "batches_per_epoch": len(self.loader),
            "ranked_by": self.metric,
            "losses": self.progress.losses,
            "arch": self.config.model.model,
            "args": settings(self.config),
            "data_config": self.data_config,
            "class_names": self.class_names,
            "optimizer": self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
        }
        if self.task.has_ema():
            state |= self.task.get_checkpoint_state(ema=True)
        if self.scaler is not None:
            state[SCALER] = self.scaler.state_dict()
        return sharding.whole(state, keep=self.process.is_primary) if self.config.fit.fsdp else state


def best_in(config: TrainConfig, val_set: Any) -> str:
    """Return the metric that checkpoints are ranked by: the loss of training where there is no validation."""
    return ranking_metric(config.splits.eval_metric, multi_label=config.data.multi_label) if val_set else "loss"


def updates(batches: int, config: TrainConfig) -> int:
    """Return the number of updates that a number of batches makes."""
    return math.ceil(batches / config.fit.grad_accum_steps)


def trained_module(task: TrainingTask) -> nn.Module:
    """Return the model of a task as it is trained."""
    module = task.get_trainable_module()
    assert module is not None
    return module


def build_run(config: TrainConfig, process: Process) -> Run:
    """Build all that a training consists of, claim its folder, and take up what it is to continue from.

    Raises:
        UserError: the data, the model or another part cannot be had or they do not fit together; or the folder is not
            free; or the checkpoint to continue from does not fit.
    """
    config = dataclasses.replace(config, model=choose_head(config.fit, config.model))
    if process.device.type == "cuda":
        torch.cuda.init()  # without, there are no statistics to reset
        torch.cuda.reset_peak_memory_stats(process.device)
    seed_everything(config.device.seed)
    train_set, val_set = open_train_and_val(config)
    names = class_names(train_set)
    config = changed(config, num_classes=resolve_num_classes(config.model.num_classes, names))
    notes = Notes(process)
    model: Any = _make_model(config, process, notes.say)
    config = changed(config, num_classes=model.num_classes)
    freezing = _make_freezing(config, model, process)
    for dataset in (train_set, val_set):
        check_labels(dataset, model.num_classes)
    prepared = data_config(config.model, config.input, model)
    fit = config.fit
    try_images(model, config.model.name, prepared["input_size"], training_batch=fit.batch_size)
    loader = train_loader(config, train_set, prepared, process)
    validation_batch = fit.validation_batch_size or fit.batch_size
    val_loader = val_set and eval_loader(config.data, val_set, prepared, process, batch_size=validation_batch)

    parts = Parts(
        train_set=train_set,
        val_set=val_set,
        class_names=names,
        data_config=prepared,
        loader=loader,
        val_loader=val_loader,
        task=make_task(config, model, prepared, names, process.device),
        metric=best_in(config, val_set),
        freezing=freezing,
    )
    return assemble_run(config, process, parts, notes)


def assemble_run(config: TrainConfig, process: Process, parts: Parts, notes: Notes) -> Run:
    """Make optimizer and schedule for what is trained, claim its folder, and take up what it is to continue from.

    Args:
        config: of the run, with the number of classes.
        process: where it runs.
        parts: what is trained, on what.
        notes: printed so far, which begin the log.

    Raises:
        UserError: the optimizer cannot be made, a flag does not go with the device; or as `build_run` of the folder.
    """
    fit, task = config.fit, parts.task
    total = total_batch(fit, process.world_size)
    lr, lr_origin = learning_rate(config.schedule, config.optimizer.opt, total)
    if fit.model_ema:
        task.setup_ema(decay=fit.model_ema_decay, use_warmup=fit.model_ema_warmup)
    if fit.fsdp:
        sharding.check(config.device, config.optimizer, process.distributed, task)
        sharding.shard(task)
    optimizer = make_optimizer(config.optimizer, lr, trained_module(task))
    needs_scaler = config.device.amp and config.device.amp_dtype == "float16"
    if fit.cuda_graphs:
        check_graphs(config, process, optimizer)
        if not needs_scaler:  # else the update is not recorded
            make_capturable(optimizer)
    scheduler, num_epochs = make_scheduler(
        config.schedule, optimizer, updates(len(parts.loader), config), seed=config.device.seed
    )
    place, found = _claim_folder(config, process, parts.data_config["input_size"][-1], parts.metric, notes.say)
    try:
        run = Run(
            config=config,
            process=process,
            **{field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)},
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=torch.amp.GradScaler(process.device.type) if needs_scaler else None,
            num_epochs=num_epochs,
            place=place,
            progress=Progress(),
        )
        _take_up(run, found, notes.say)
        run = dataclasses.replace(run, replicas=_wrap_model(run))
        return _with_report(run, notes, lr, lr_origin) if process.is_primary else run
    except BaseException:
        place.release()
        raise


def _claim_folder(
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


def _take_up(run: Run, found: Found | None, say: Callable[[str], None]) -> None:
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
    compare_classes(state.get("class_names"), run.class_names, str(path))
    done = progress_of(state, path)
    opt = recorded_args(state).get("opt", config.optimizer.opt)
    if opt != config.optimizer.opt and keeps_optimizer:  # torch would load its state all the same
        raise UserError(
            f"{path} was trained by opt={opt!r}, this run has {config.optimizer.opt!r}; or pass --no-resume-opt"
        )
    try:
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
        raise UserError(f"{path} does not fit this run of {model}: {error}") from error
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


def _wrap_model(run: Run) -> Replicas | None:
    """Compile and join the processes, in this order, on loaded weights; return what joins them by CUDA graphs."""
    model, task, process = run.config.model, run.task, run.process
    if model.torchcompile:
        prepare_compiler(model)
        task.compile(backend=model.torchcompile, mode=model.torchcompile_mode)
        task.compile_ema(backend=model.torchcompile, mode=model.torchcompile_mode)
    broadcast_buffers = not run.config.fit.no_ddp_bb
    if process.distributed and run.config.fit.cuda_graphs:
        return Replicas(run.trainable, broadcast_buffers=broadcast_buffers)
    if process.distributed and not run.config.fit.fsdp:
        device_ids = None if process.device.type == "cpu" else [process.device]
        task.prepare_distributed(device_ids=device_ids, broadcast_buffers=broadcast_buffers)
    return None


def _with_report(run: Run, notes: Notes, lr: float, lr_origin: str) -> Run:
    """Return a run with its log, which begins with what it consists of."""
    config, progress = run.config, run.progress
    text = require("yaml").safe_dump(settings(config), sort_keys=False)
    make_folder(run.folder)
    write_atomically(run.folder / "args.yaml", lambda file: file.write(text.encode()))
    surroundings = environment(run.process.device)
    found = require("yaml").safe_dump(surroundings, sort_keys=False)
    write_atomically(run.folder / "environment.yaml", lambda file: file.write(found.encode()))
    reporter = Reporter(
        run.folder,
        config.run,
        record={**settings(config), "lr": lr},
        device=run.process.device,
        first_epoch=progress.epoch,
        first_update=run.update,
    )
    for said in notes.lines:
        reporter.keep(said)
    say = reporter.say
    say(", ".join(f"{name} {number}" for name, number in surroundings["versions"].items()))
    parameters = sum(p.numel() for p in run.trainable.parameters())
    model = config.model
    say(
        f"{model.model}: {parameters / 1e6:.2f} M parameters, {count_of(model.num_classes, 'class')}, {run.data_config}"
    )
    if teacher := teacher_name(config.distillation):
        say(f"distilling from {teacher} ({config.distillation.kd_distill_type})")
    if isinstance(run.task, AuxiliaryTask):
        weights = ", ".join(f"{name} (weight {weight:g})" for name, weight in run.task.weights.items())
        say(f"learning beside logits: {weights}")
    validated = f"{len(run.val_set)} to validate on" if run.val_set else "no validation"
    devices = f"{run.process.world_size} x {run.process.device}"
    say(f"{count_of(len(run.train_set), 'image')} to train on, {validated}; {devices}")
    for note in [note for images in (run.train_set, run.val_set) for note in getattr(images, "notes", [])]:
        say(note)
    warmup = config.schedule.warmup_epochs
    if run.scheduler is not None and warmup >= run.num_epochs:
        say(f"all of it is warm-up (--warmup-epochs {warmup}): lr {lr:g} is never reached")
    say(f"{count_of(run.num_epochs, 'epoch')} of {count_of(run.updates_per_epoch, 'update')}; {lr_origin}")
    say(f"run folder {run.folder}")
    return dataclasses.replace(run, reporter=reporter)


def _make_freezing(config: TrainConfig, model: nn.Module, process: Process) -> LayerFreezing | None:
    """Return the schedule of --freeze-layers; the layers that never learn are frozen, so that no optimizer has them.

    Raises:
        UserError: another flag has no place beside it, or as `LayerFreezing`.
    """
    given = config.fit.freeze_layers
    if not given:
        return None
    if config.fit.freeze:
        raise UserError("--freeze-layers: --freeze leaves only the classifier to learn; give one of them")
    freezing = LayerFreezing(given, model, config.model.name)
    if freezing.count(0) and not _has_weights(config):
        raise UserError(
            f"--freeze-layers freezes {count_of(freezing.count(0), 'layer')} of random weights at epoch 0; give "
            "--pretrained, --pretrained-path or --initial-checkpoint, or freeze them later"
        )
    if freezing.changes and (process.distributed or config.fit.cuda_graphs):
        flag = "--cuda-graphs" if config.fit.cuda_graphs else "a run of several processes"
        raise UserError(
            f"--freeze-layers changes what learns at epoch {freezing.changes[0]}, and {flag} fixes it at the start; "
            "freeze from epoch 0 only, or leave one of them out"
        )
    freezing.apply(model, freezing.always)
    return freezing


def _has_weights(config: TrainConfig) -> bool:
    """Whether something gives the model's features weights."""
    fit = config.fit
    return bool(config.model.pretrained or fit.pretrained_path or fit.initial_checkpoint or config.run.resume)


def check_graphs(config: TrainConfig, process: Process, optimizer: Optimizer) -> None:
    """Refuse what --cuda-graphs cannot record.

    Raises:
        UserError: there is no GPU, or a flag that it does not go with.
    """
    mode = config.model.torchcompile_mode or ""
    if process.device.type != "cuda":
        raise UserError(f"--cuda-graphs: only launches on a CUDA device can be recorded, this is {process.device}")
    for flag, what in (("fsdp", "fetches weights"), ("sync_bn", "sends statistics")):
        if getattr(config.fit, flag):
            raise UserError(
                f"--cuda-graphs: --{flag.replace('_', '-')} {what} between the launches, which is not recorded; leave "
                "one of them out"
            )
    if config.fit.grad_checkpointing:
        raise UserError(
            "--cuda-graphs: --grad-checkpointing sets random states in the backward pass, which a recording forbids; "
            "leave one of them out"
        )
    if config.model.torchcompile and (mode == "reduce-overhead" or mode == "max-autotune"):
        raise UserError(
            f"--cuda-graphs: --torchcompile-mode {mode} makes CUDA graphs of its own; leave one of them out, or take "
            "max-autotune-no-cudagraphs"
        )
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"--cuda-graphs: --opt {config.optimizer.opt} differentiates gradients, which is not recorded; take "
            "another optimizer, or leave it out"
        )


def _make_model(config: TrainConfig, process: Process, say: Callable[[str], object]) -> nn.Module:
    fit = config.fit
    overlay = {"file": fit.pretrained_path, "num_classes": -1} if fit.pretrained_path else None  # -1: adapt the head
    model = build_model(
        config.model,
        config.input,
        pretrained_path=fit.pretrained_path,
        say=say,
        drop_rate=fit.drop,
        drop_path_rate=fit.drop_path,
        drop_block_rate=fit.drop_block,
        bn_momentum=fit.bn_momentum,
        bn_eps=fit.bn_eps,
        pretrained_cfg_overlay=overlay,
    )
    if fit.initial_checkpoint:
        advice = " (--pretrained-path takes all but the classifier, where the classes differ)"
        source = read_checkpoint(fit.initial_checkpoint)
        load(model, source, fit.initial_checkpoint, new_parts=True, advice=advice)
    regularize_attention(fit, model, config.model.name, say)
    if fit.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if fit.freeze:
        freeze(model, config.model.name, has_weights=_has_weights(config))
    if process.distributed and fit.sync_bn:
        if process.device.type == "cpu":
            raise UserError("--sync-bn: torch's synchronized batch norm needs GPUs; leave it out on CPUs")
        model = convert_sync_batchnorm(model)
    model.to(process.device)
    return model.to(memory_format=torch.channels_last) if config.model.channels_last else model
