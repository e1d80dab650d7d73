"""A training run: model, data, optimizer, schedule and folder, of which only the progress changes."""

import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from torch import nn
from torch.optim import Optimizer

from visionzoo.engine import sharding
from visionzoo.engine.checkpoints import LAST, RECOVERY, CheckpointFolder
from visionzoo.engine.data import end_loading
from visionzoo.engine.flags import TrainConfig
from visionzoo.engine.freezing import LayerFreezing
from visionzoo.engine.optimization import ranking_metric
from visionzoo.engine.options import settings
from visionzoo.engine.ownership import Claim
from visionzoo.engine.parallel import Process, starter
from visionzoo.engine.reporting import Reporter
from visionzoo.quantization import Annealing
from visionzoo.replicas import Replicas

SCALER = "amp_scaler"  # timm's name of its state in a checkpoint


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
        annealing: what freezes quantized weights in the last epochs; None for nothing.
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
    annealing: Annealing | None = None
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
    def anneals(self) -> bool:
        """Whether the epoch in progress is one of the last, in which quantized weights are frozen."""
        return self.progress.epoch >= self.num_epochs - self.config.fit.quantize_anneal

    @property
    def finished(self) -> bool:
        """Whether all epochs, or the step limit, are done and validated."""
        return self.progress.epoch >= self.num_epochs or (self.at_max_steps and self.progress.validated)

    @property
    def trainable(self) -> nn.Module:
        """The model as it is trained: compiled, and wrapped for several processes."""
        return trained_module(self.task)

    @property
    def student(self) -> nn.Module:
        """The model, without what only its training has: a projector onto a teacher's features."""
        model = self.task.get_eval_model()
        assert model is not None
        return model

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
