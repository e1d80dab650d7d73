"""Build a training run from its configuration."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.optim import Optimizer

from visionzoo.engine import sharding
from visionzoo.engine.auxiliary import AuxiliaryTask
from visionzoo.engine.calling import compile_model, try_images
from visionzoo.engine.checkpoints import make_folder, read_checkpoint, write_atomically
from visionzoo.engine.data import (
    check_labels,
    class_names,
    eval_loader,
    open_train_and_val,
    resolve_num_classes,
    train_loader,
)
from visionzoo.engine.distillation import describe_teacher, make_task, teacher_name
from visionzoo.engine.environment import environment
from visionzoo.engine.errors import UserError, require
from visionzoo.engine.flags import TrainConfig
from visionzoo.engine.freezing import has_weights, make_freezing
from visionzoo.engine.idle_flags import idle_flags
from visionzoo.engine.images import seed_everything
from visionzoo.engine.models import build_model, data_config
from visionzoo.engine.optimization import learning_rate, make_optimizer, make_scheduler, total_batch
from visionzoo.engine.options import changed, settings
from visionzoo.engine.ownership import MARK
from visionzoo.engine.parallel import Process
from visionzoo.engine.probing import choose_head, freeze
from visionzoo.engine.quantization import begin_scales, make_annealing, quantize_model
from visionzoo.engine.regularization import regularize_attention
from visionzoo.engine.reporting import Reporter
from visionzoo.engine.resuming import claim_folder, take_up
from visionzoo.engine.run import Parts, Progress, Run, best_in, trained_module, updates
from visionzoo.engine.scalekd import ScaleKDTask
from visionzoo.engine.weights import load
from visionzoo.graphs import make_capturable
from visionzoo.quantization import holds_quantizers
from visionzoo.replicas import Replicas
from visionzoo.text import count_of


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
    freezing = make_freezing(config, model, process)
    for dataset in (train_set, val_set):
        check_labels(dataset, model.num_classes)
    prepared = data_config(config.model, config.input, model)
    fit = config.fit
    try_images(model, config.model.name, prepared["input_size"], training_batch=fit.batch_size)
    loader = train_loader(config, train_set, prepared, process)
    validation_batch = fit.validation_batch_size or fit.batch_size
    val_loader = val_set and eval_loader(config.data, val_set, prepared, process, batch_size=validation_batch)

    begin_scales(config, model, train_set, prepared, process, notes.say)
    if freezing:
        freezing.begin(model)
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
    if idle := idle_flags(config):
        notes.say(idle)
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
    if (accumulated := fit.grad_accum_steps) > (batches := len(parts.loader)):
        seen = f"an epoch has {count_of(batches, 'batch')}, which make one smaller update"
        notes.say(f"--grad-accum-steps {accumulated}: {seen}; a scaled learning rate is that of a full one")
    if (start := config.run.start_epoch) is not None and start >= num_epochs:
        raise UserError(f"--start-epoch {start}: the run ends before, after {count_of(num_epochs, 'epoch')}")
    if parts.freezing and (late := max(parts.freezing.counts)) >= num_epochs:
        raise UserError(
            f"--freeze-layers {late}={parts.freezing.counts[late]}: the run ends before, after "
            f"{count_of(num_epochs, 'epoch')}; name an earlier epoch, or leave it out"
        )
    annealing = make_annealing(config, trained_module(task), num_epochs, process)
    place, found = claim_folder(config, process, parts.data_config["input_size"][-1], parts.metric, notes.say)
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
            annealing=annealing,
        )
        take_up(run, found, notes.say)
        run = dataclasses.replace(run, replicas=_wrap_model(run))
        return _with_report(run, notes, lr, lr_origin) if process.is_primary else run
    except BaseException:
        place.release()
        raise


def _make_model(config: TrainConfig, process: Process, say: Callable[[str], object]) -> nn.Module:
    fit = config.fit
    overlay = {"file": fit.pretrained_path, "num_classes": -1} if fit.pretrained_path else None  # -1: adapt the head
    source = read_checkpoint(fit.initial_checkpoint) if fit.initial_checkpoint else {}
    float_start = bool(source) and not holds_quantizers(source)  # then quantizers come after the weights
    model = build_model(
        dataclasses.replace(config.model, quantize={}) if float_start else config.model,
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
        load(model, source, fit.initial_checkpoint, new_parts=True, advice=advice)
    if float_start:
        quantize_model(model, config.model)
    regularize_attention(fit, model, config.model.name, say)
    if fit.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if fit.freeze:
        freeze(model, config.model.name, has_weights=has_weights(config))
    if process.distributed and fit.sync_bn:
        if process.device.type == "cpu":
            raise UserError("--sync-bn: torch's synchronized batch norm needs GPUs; leave it out on CPUs")
        model = convert_sync_batchnorm(model)
    model.to(process.device)
    return model.to(memory_format=torch.channels_last) if config.model.channels_last else model


def check_graphs(config: TrainConfig, process: Process, optimizer: Optimizer | None = None) -> None:
    """Refuse what --cuda-graphs cannot record.

    Args:
        config: of the training.
        process: with the device.
        optimizer: None where there is none yet.

    Raises:
        UserError: there is no GPU, or a flag that it does not go with.
    """
    mode = config.model.torchcompile_mode or ""
    if process.device.type != "cuda":
        raise UserError(
            f"--cuda-graphs: only launches on a CUDA device can be recorded, this is {process.device}; leave it out"
        )
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


def _wrap_model(run: Run) -> Replicas | None:
    """Compile and join the processes, in this order, on loaded weights; return what joins them by CUDA graphs."""
    task, process = run.task, run.process
    compile_model(run.config.model, task)
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
    surroundings = environment(run.process.device)
    make_folder(run.folder)
    yaml = require("yaml")
    found, given = (yaml.safe_dump(content, sort_keys=False).encode() for content in (surroundings, settings(config)))
    write_atomically(run.folder / MARK, lambda file: file.write(found))  # first: a kill may follow
    write_atomically(run.folder / "args.yaml", lambda file: file.write(given))
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
    parameters = sum(p.numel() for p in run.student.parameters())
    model = config.model
    say(
        f"{model.model}: {parameters / 1e6:.2f} M parameters, {count_of(model.num_classes, 'class')}, {run.data_config}"
    )
    if teacher_name(config.distillation):
        say(describe_teacher(config.distillation, run.task, tuple(run.data_config["input_size"])))
    if isinstance(run.task, ScaleKDTask):
        say(run.task.describe())
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
