"""What a training run consists of, built from the flags, and how it is saved and taken up again."""

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
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
    progress,
    read_checkpoint,
    write_atomically,
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
from visionzoo.engine.errors import UserError, require
from visionzoo.engine.images import seed_everything
from visionzoo.engine.models import (
    build_model,
    data_config,
    load,
    prepare_compiler,
    try_images,
)
from visionzoo.engine.observation import environment
from visionzoo.engine.ownership import Claim, check_free, check_own, claim
from visionzoo.engine.parallel import Process, starter
from visionzoo.engine.probing import choose_head, freeze
from visionzoo.engine.recipe import learning_rate, load_optimizer, make_optimizer, make_scheduler, ranking_metric
from visionzoo.engine.recorded import changed_settings, compare_classes, recorded_args
from visionzoo.engine.reporting import Reporter
from visionzoo.graphs import make_capturable
from visionzoo.replicas import Replicas

SCALER = "amp_scaler"  # timm's name of its state in a checkpoint


class Run:
    """Model, data, optimizer, schedule and folder of one training, and how far it has come.

    Attributes:
        epoch, batches_done: the epoch in progress and the batches done in it.
        losses: sum of the losses of these batches' images, their number, and the sums of the losses' parts by name.
        validated: whether there is a checkpoint with metric of just this place.
        reporter: the log, in the primary process only.
    """

    def __init__(self, args: argparse.Namespace, process: Process) -> None:
        self.args = args = argparse.Namespace(**vars(args))
        self.process = process
        choose_head(args)
        if process.device.type == "cuda":
            torch.cuda.init()  # without, there are no statistics to reset
            torch.cuda.reset_peak_memory_stats(process.device)
        seed_everything(args.seed)
        self.train_set, self.val_set = open_train_and_val(args)
        self.class_names = class_names(self.train_set)
        args.num_classes = resolve_num_classes(args.num_classes, self.class_names)
        self.reporter: Reporter | None = None
        self._said: list[str] = []  # before there is one
        model = _make_model(args, process, self.say)
        args.num_classes = model.num_classes
        for dataset in (self.train_set, self.val_set):
            check_labels(dataset, args.num_classes)
        self.recorded_args = dict(vars(args))  # as given but for num_classes: lr stays open where it is to be scaled
        self.data_config = data_config(args, model)
        try_images(model, args.model, self.data_config["input_size"], training_batch=args.batch_size)
        self.loader = train_loader(args, self.train_set, self.data_config, process)
        self.val_loader = self.val_set and eval_loader(args, self.val_set, self.data_config, process)
        self.updates_per_epoch = math.ceil(len(self.loader) / args.grad_accum_steps)

        args.lr, lr_origin = learning_rate(args, process.world_size)
        self.task = make_task(args, model, self.data_config, self.class_names, process.device)
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.fsdp:
            sharding.check(args, process.distributed, self.task)
            sharding.shard(self.task)
        self.optimizer = make_optimizer(args, self.trainable)
        needs_scaler = args.amp and args.amp_dtype == "float16"
        if args.cuda_graphs:
            check_graphs(args, process, self.optimizer)
            if not needs_scaler:  # else the update is not recorded
                make_capturable(self.optimizer)
        self.scheduler, self.num_epochs = make_scheduler(args, self.optimizer, self.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(process.device.type) if needs_scaler else None

        self.epoch = self.batches_done = 0
        self.losses: tuple[float, int, dict[str, float]] = (0.0, 0, {})
        self.validated = False
        self.metric = ranking_metric(args) if self.val_set else "loss"
        self._claim: Claim | None = None
        try:
            self._take_up(self._claim_folder())
            self._wrap_model()
            if process.is_primary:
                self._start_report(lr_origin)
        except BaseException:
            self.close()
            raise

    @property
    def update(self) -> int:
        """The updates done so far."""
        return self.epoch * self.updates_per_epoch + math.ceil(self.batches_done / self.args.grad_accum_steps)

    @property
    def at_max_steps(self) -> bool:
        """Whether the step limit is reached."""
        return self.args.max_steps is not None and self.update >= self.args.max_steps

    @property
    def finished(self) -> bool:
        """Whether all epochs, or the step limit, are done and validated."""
        return self.epoch >= self.num_epochs or (self.at_max_steps and self.validated)

    @property
    def trainable(self) -> nn.Module:
        """The model as it is trained: compiled, and wrapped for several processes."""
        module = self.task.get_trainable_module()
        assert module is not None
        return module

    @property
    def lr(self) -> float:
        """The learning rate now, averaged over the parameter groups."""
        groups = self.optimizer.param_groups
        return sum(group["lr"] for group in groups) / len(groups)

    def close(self) -> None:
        """Give the folder back to others, and end the loading processes."""
        if self._claim is not None:
            self._claim.release()
        end_loading(self.loader)
        end_loading(self.val_loader)

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch, self.batches_done, self.losses = self.epoch + 1, 0, (0.0, 0, {})

    def say(self, text: str) -> None:
        """Print a line, in the primary process."""
        if self.reporter:
            self.reporter.say(text)
        elif self.process.is_primary:
            self._said.append(text)
            print(text, flush=True)

    def resume_command(self, checkpoint: str = LAST) -> str:
        """Return the command that goes on from a checkpoint of this run."""
        tool, *words = sys.argv
        for index, word in reversed(list(enumerate(words))):
            if word.startswith("--resume"):
                del words[index : index + (1 if "=" in word else 2)]
        return f"{starter(tool)} {shlex.join([*words, '--resume', str(self.folder / checkpoint)])}"

    def last_good(self) -> str:
        """Return which checkpoint of this run there is and the command that goes on from it."""
        found = [name for name in (RECOVERY, LAST) if (self.folder / name).exists()]
        if not found:
            return "There is no checkpoint yet"
        return f"The last good checkpoint: {self.folder / found[0]}; go on with: {self.resume_command(found[0])}"

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint holds, in plain types and tensors; all processes call this."""
        state = {
            "version": 2,  # timm's number for: `epoch` is the one that ended
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "batches_per_epoch": len(self.loader),
            "ranked_by": self.metric,
            "losses": self.losses,
            "arch": self.args.model,
            "args": self.recorded_args,
            "data_config": self.data_config,
            "class_names": self.class_names,
            "optimizer": self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
        }
        if self.task.has_ema():
            state |= self.task.get_checkpoint_state(ema=True)
        if self.scaler is not None:
            state[SCALER] = self.scaler.state_dict()
        return sharding.whole(state, keep=self.process.is_primary) if self.args.fsdp else state

    def _claim_folder(self) -> tuple[Path, dict[str, Any]] | None:
        """Make the run's folder its own and return what to go on from; the first process does, and tells the others.

        Raises:
            UserError: another run is there or at work there, or what is there cannot be read.
        """
        args, process = self.args, self.process
        found: tuple[Path, dict[str, Any]] | None = None
        refused: UserError | None = None
        if args.resume not in ("", "auto"):
            found = Path(args.resume), read_checkpoint(args.resume)
        if process.is_primary:
            try:
                self._claim = claim(args, self.data_config["input_size"][-1], found)
                found = self._found(self._claim, found)
            except UserError as error:
                refused = error
        if said := process.told(str(refused) if refused else None):
            raise UserError(said) from refused
        self.folder = Path(str(process.told(str(self._claim.folder) if self._claim else None)))
        path = process.told(str(found[0]) if found else None)
        if not process.is_primary:
            self.checkpoints = self._checkpoint_folder()
            if path and not found:
                found = Path(path), read_checkpoint(path)
        return found

    def _found(self, own: Claim, found: tuple[Path, dict[str, Any]] | None) -> tuple[Path, dict[str, Any]] | None:
        """Return what to go on from, once the folder is found fit for it."""
        args, self.folder = self.args, own.folder
        self.checkpoints = self._checkpoint_folder()
        if own.note:
            self.say(own.note)
        if args.resume == "auto":
            found = self.checkpoints.newest(warn=self.say)
            if not found:
                self.say(f"no checkpoint in {self.folder}: starting from the beginning")
        if found and found[0].parent.resolve() == self.folder.resolve():
            check_own(self.folder, *found, ranked_by=self.metric)
            if args.resume != "auto" and not args.experiment:
                self.checkpoints.check_newest(*found)
        else:
            check_free(self.folder)
            if found and not args.experiment:
                self.say(f"what lies beside {found[0]} stays as it is: going on in {self.folder}")
        self.checkpoints.clear_leftovers()
        return found

    def _checkpoint_folder(self) -> CheckpointFolder:
        return CheckpointFolder(self.folder, keep=self.args.checkpoint_hist, lower_is_better=self.metric == "loss")

    def _take_up(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        """Go on from `found`, if anything; then the moving average and the schedule stand where the run stands."""
        args = self.args
        state = self._restore(*found) if found else {}
        if args.model_ema and state:  # without averages of its own it starts at the weights
            key, task_key = ("state_dict_ema", "task_state_ema")
            if key not in state:
                key, task_key = ("state_dict", "task_state")
            self._load(state[key], state.get(task_key), ema=True)
        if args.start_epoch is not None:
            self.epoch, self.batches_done, self.losses = args.start_epoch, 0, (0.0, 0, {})
        if self.scheduler is not None and self.update:
            self.scheduler.step(self.epoch)
            self.scheduler.step_update(self.update)

    def _restore(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        args = self.args
        if (arch := state.get("arch", args.model)) != args.model:
            raise UserError(f"{path} is a checkpoint of {arch}, this run is of {args.model}")
        if "state_dict" not in state or "epoch" not in state:
            raise UserError(f"{path} holds no training state; to start from its weights use --initial-checkpoint")
        compare_classes(state.get("class_names"), self.class_names, str(path))
        done = progress(state, path)
        opt = recorded_args(state).get("opt", args.opt)
        if opt != args.opt and not args.no_resume_opt:  # torch would load its state all the same
            raise UserError(f"{path} was trained by opt={opt!r}, this run has {args.opt!r}; or pass --no-resume-opt")
        try:
            self._load(state["state_dict"], state.get("task_state"))
            if not args.no_resume_opt:
                shares = sharding.optimizer_shares(state["optimizer"], self.optimizer)
                load_optimizer(args, self.optimizer, shares, recorded_args(state))
                if self.scaler is not None and SCALER in state:
                    self.scaler.load_state_dict(state[SCALER])
            self.epoch, self.batches_done = done
            loss, images, *parts = state.get("losses", self.losses)
            self.losses = (float(loss), int(images), {name: float(v) for part in parts for name, v in part.items()})
        except KeyError as error:
            raise UserError(f"{path} lacks {error}; --no-resume-opt takes up its weights alone") from error
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{path} does not fit this run of {args.model}: {error}") from error
        batches_per_epoch = state.get("batches_per_epoch", self.batches_done)
        if self.batches_done < batches_per_epoch != len(self.loader):
            self.say(
                f"{path} was written in mid-epoch with {batches_per_epoch} batches an epoch, now there are "
                f"{len(self.loader)}: the epoch begins anew"
            )
            self.batches_done, self.losses = 0, (0.0, 0, {})
        self.validated = "metric" in state  # else it was stopped before
        if self.batches_done >= batches_per_epoch and self.validated:
            self.next_epoch()
        self.process.agree(0)  # all have read it
        if self.process.is_primary and path.parent.resolve() == self.folder.resolve():
            for kept in self.checkpoints.continue_from(path, state):
                self.say(f"what cannot be read is kept as {kept}")
        self.say(f"going on from {path} in epoch {self.epoch}, batch {self.batches_done}")
        if changes := changed_settings(state, self.recorded_args, self.data_config):
            self.say(f"other than in {path}, and from here on: {', '.join(changes)}")
        return state

    def _load(self, weights: dict[str, Any], task_state: dict[str, Any] | None, *, ema: bool = False) -> None:
        model = self.task.get_eval_model(ema=ema)
        assert model is not None
        self.task.load_checkpoint_state(sharding.shares(weights, unwrap_model(model)), task_state, ema=ema)

    def _wrap_model(self) -> None:
        """Compile and join the processes, in this order, on loaded weights."""
        args, task = self.args, self.task
        if args.torchcompile:
            prepare_compiler(args)
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
        self.replicas: Replicas | None = None
        if self.process.distributed and args.cuda_graphs:
            self.replicas = Replicas(self.trainable, broadcast_buffers=not args.no_ddp_bb)
        elif self.process.distributed and not args.fsdp:
            device_ids = None if self.process.device.type == "cpu" else [self.process.device]
            task.prepare_distributed(device_ids=device_ids, broadcast_buffers=not args.no_ddp_bb)

    def _start_report(self, lr_origin: str) -> None:
        args = self.args
        text = require("yaml").safe_dump(self.recorded_args, sort_keys=False)
        make_folder(self.folder)
        write_atomically(self.folder / "args.yaml", lambda file: file.write(text.encode()))
        surroundings = environment(self.process.device)
        found = require("yaml").safe_dump(surroundings, sort_keys=False)
        write_atomically(self.folder / "environment.yaml", lambda file: file.write(found.encode()))
        self.reporter = Reporter(
            self.folder, args, device=self.process.device, first_epoch=self.epoch, first_update=self.update
        )
        for said in self._said:
            self.reporter.keep(said)
        self.say(", ".join(f"{name} {number}" for name, number in surroundings["versions"].items()))
        parameters = sum(p.numel() for p in self.trainable.parameters())
        self.say(f"{args.model}: {parameters / 1e6:.2f} M parameters, {args.num_classes} classes, {self.data_config}")
        if teacher := teacher_name(args):
            self.say(f"distilling from {teacher} ({args.kd_distill_type})")
        if isinstance(self.task, AuxiliaryTask):
            weights = ", ".join(f"{name} (weight {weight:g})" for name, weight in self.task.weights.items())
            self.say(f"learning beside logits: {weights}")
        validated = f"{len(self.val_set)} to validate on" if self.val_set else "no validation"
        devices = f"{self.process.world_size} x {self.process.device}"
        self.say(f"{len(self.train_set)} images to train on, {validated}; {devices}")
        for note in [note for images in (self.train_set, self.val_set) for note in getattr(images, "notes", [])]:
            self.say(note)
        if self.scheduler is not None and args.warmup_epochs >= self.num_epochs:
            self.say(f"all of it is warm-up (--warmup-epochs {args.warmup_epochs}): lr {args.lr:g} is never reached")
        self.say(f"{self.num_epochs} epochs of {self.updates_per_epoch} updates; {lr_origin}")
        self.say(f"run folder {self.folder}")


def check_graphs(args: argparse.Namespace, process: Process, optimizer: Optimizer) -> None:
    """Refuse what --cuda-graphs cannot record.

    Raises:
        UserError: there is no GPU, or a flag that it does not go with.
    """
    mode = args.torchcompile_mode or ""
    if process.device.type != "cuda":
        raise UserError(f"--cuda-graphs: what is recorded are launches on a CUDA device, this is {process.device}")
    for flag, what in (("fsdp", "fetches weights"), ("sync_bn", "sends statistics")):
        if getattr(args, flag):
            raise UserError(
                f"--cuda-graphs: --{flag.replace('_', '-')} {what} between the launches, which is not recorded; leave "
                "one of them out"
            )
    if args.grad_checkpointing:
        raise UserError(
            "--cuda-graphs: --grad-checkpointing sets random states in the backward pass, which a recording forbids; "
            "leave one of them out"
        )
    if args.torchcompile and (mode == "reduce-overhead" or mode == "max-autotune"):
        raise UserError(
            f"--cuda-graphs: --torchcompile-mode {mode} makes CUDA graphs of its own; leave one of them out, or take "
            "max-autotune-no-cudagraphs"
        )
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"--cuda-graphs: --opt {args.opt} differentiates gradients, which is not recorded; take another optimizer, "
            "or leave it out"
        )


def _make_model(args: argparse.Namespace, process: Process, say: Callable[[str], object]) -> nn.Module:
    overlay = {"file": args.pretrained_path, "num_classes": -1} if args.pretrained_path else None  # -1: adapt the head
    model = build_model(
        args,
        say=say,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        pretrained_cfg_overlay=overlay,
    )
    if args.initial_checkpoint:
        advice = " (--pretrained-path takes all but the classifier, where the classes differ)"
        source = read_checkpoint(args.initial_checkpoint)
        load(model, source, args.initial_checkpoint, new_parts=True, advice=advice)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if args.freeze:
        freeze(args, model)
    if process.distributed and args.sync_bn:
        if process.device.type == "cpu":
            raise UserError("--sync-bn: torch's synchronised batch norm needs GPUs; leave it out on CPUs")
        model = convert_sync_batchnorm(model)
    model.to(process.device)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model
