"""Loss, learning rate, optimizer and schedule from the flags, as timm's train script makes them."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from visionzoo.engine.data import mixing
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import AugmentationConfig, FitConfig, OptimizerConfig, ScheduleConfig
from visionzoo.engine.multilabel import MultiLabelLoss
from visionzoo.graphs import place_counts

# What flags say to an optimizer, by its names; its other entries in a checkpoint are how far it has come.
SETTINGS = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "momentum", "eps")
KINDS = ("capturable", "fused", "foreach")  # what computes it


def make_loss(augmentation: AugmentationConfig, *, multi_label: bool) -> nn.Module:
    """Return the training loss; mixed targets are smoothed already."""
    if multi_label:
        return MultiLabelLoss(smoothing=0.0, sum_classes=augmentation.bce_sum, pos_weight=augmentation.bce_pos_weight)
    if augmentation.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0.0 if mixing(augmentation) else augmentation.smoothing,
            target_threshold=augmentation.bce_target_thresh,
            sum_classes=augmentation.bce_sum,
            pos_weight=augmentation.bce_pos_weight,
        )
    if mixing(augmentation):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(augmentation.smoothing) if augmentation.smoothing else nn.CrossEntropyLoss()


def total_batch(fit: FitConfig, world_size: int) -> int:
    """Return the images of an update, over all processes and accumulated batches."""
    return fit.batch_size * world_size * fit.grad_accum_steps


def learning_rate(schedule: ScheduleConfig, opt: str, total: int) -> tuple[float, str]:
    """Return the learning rate and how it came about: --lr, or --lr-base scaled to the total batch.

    Args:
        schedule: has either.
        opt: name of the optimizer, by which the scaling goes where it is not given.
        total: images of an update.
    """
    if schedule.lr is not None:
        return schedule.lr, f"lr {schedule.lr:g} as given, total batch {total}"
    ratio = total / schedule.lr_base_size
    scale = schedule.lr_base_scale or ("sqrt" if any(name in opt.lower() for name in ("ada", "lamb")) else "linear")
    lr = schedule.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)
    base = f"{schedule.lr_base:g} at {schedule.lr_base_size}"
    return lr, f"lr {lr:g} = {base}, scaled ({scale}) to a total batch of {total}"


def ranking_metric(given: str, *, multi_label: bool) -> str:
    """Return what the best checkpoint is best in: as --eval-metric says, for images with several labels `map`."""
    return "map" if multi_label and given != "loss" else given


def make_optimizer(optimizer: OptimizerConfig, lr: float, model: nn.Module) -> Optimizer:
    """Create the optimizer over `model`'s parameters by timm.

    Raises:
        UserError: timm has no such optimizer, or it does not take an argument, or another number of betas.
    """
    try:
        timms = optimizer_kwargs(cfg=SimpleNamespace(**asdict(optimizer), lr=lr))
        known = get_optimizer_info(optimizer.opt.lower().removeprefix("lookahead_"))
        if known.has_betas and optimizer.opt_betas is not None and len(optimizer.opt_betas) != known.num_betas:
            raise ValueError(f"--opt-betas: expected {known.num_betas}, got {len(optimizer.opt_betas)}")
        return create_optimizer_v2(model, **timms, **optimizer.opt_kwargs)
    except (AssertionError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot make the optimizer opt={optimizer.opt!r}: {error}") from error


def load_optimizer(given: OptimizerConfig, optimizer: Optimizer, state: dict[str, Any], before: dict[str, Any]) -> None:
    """Load an optimizer's state of a checkpoint; rates, decay and the like stay as this run was given them.

    Args:
        given: to this run.
        optimizer: as made of it.
        state: of `optimizer.state_dict()`, which holds the settings of the run that wrote it too.
        before: flags of that run.
    """
    names = {*SETTINGS, *KINDS, *given.opt_kwargs, *(before.get("opt_kwargs") or {})}
    own = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    place_counts(optimizer)


def make_scheduler(
    schedule: ScheduleConfig, optimizer: Optimizer, updates_per_epoch: int, *, seed: int
) -> tuple[Scheduler | None, int]:
    """Return timm's schedule and the number of epochs with cool-down; it depends only on epoch and update.

    Args:
        schedule: what is made.
        optimizer: whose rates it sets.
        updates_per_epoch: for schedules that go by updates.
        seed: of the noise.

    Raises:
        UserError: numbers that have to rise do not, or there are too many.
    """
    for flag, numbers in (("--lr-noise", schedule.lr_noise), ("--decay-milestones", schedule.decay_milestones)):
        many = flag == "--lr-noise" and numbers and len(numbers) > 2
        if many or list(numbers or ()) != sorted(set(numbers or ())):
            expected = "one or two shares, rising" if flag == "--lr-noise" else "epochs, rising"
            raise UserError(f"{flag}: expected {expected}, got {' '.join(map(str, numbers or ()))}")
    settings: dict[str, Any] = scheduler_kwargs(schedule, decreasing_metric=False)  # no schedule here goes by a metric
    settings["noise_seed"] = seed
    scheduler, epochs = create_scheduler_v2(optimizer, **settings, updates_per_epoch=updates_per_epoch)
    if scheduler is None:  # which would apply --layer-decay
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return scheduler, epochs
