"""Loss, learning rate, optimizer and schedule from the flags, as timm's train script makes them."""

import argparse
from typing import Any

from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from visionzoo.engine.data import mixing
from visionzoo.engine.errors import UserError
from visionzoo.engine.multilabel import MultiLabelLoss
from visionzoo.graphs import place_counts

# What flags say to an optimizer, by its names; its other entries in a checkpoint are how far it has come.
SETTINGS = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "momentum", "eps")
KINDS = ("capturable", "fused", "foreach")  # what computes it


def make_loss(args: argparse.Namespace) -> nn.Module:
    """Return the training loss; mixed targets are smoothed already."""
    if args.multi_label:
        return MultiLabelLoss(smoothing=0.0, sum_classes=args.bce_sum, pos_weight=args.bce_pos_weight)
    if args.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0.0 if mixing(args) else args.smoothing,
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    if mixing(args):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def learning_rate(args: argparse.Namespace, world_size: int) -> tuple[float, str]:
    """Return the learning rate and how it came about: --lr, or --lr-base scaled to the total batch."""
    total = args.batch_size * world_size * args.grad_accum_steps
    if args.lr is not None:
        return args.lr, f"lr {args.lr:g} as given, total batch {total}"
    ratio = total / args.lr_base_size
    scale = args.lr_base_scale or ("sqrt" if any(name in args.opt.lower() for name in ("ada", "lamb")) else "linear")
    lr = args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)
    return lr, f"lr {lr:g} = {args.lr_base:g} at {args.lr_base_size}, scaled ({scale}) to a total batch of {total}"


def ranking_metric(args: argparse.Namespace) -> str:
    """Return what the best checkpoint is best in."""
    return "map" if args.multi_label and args.eval_metric != "loss" else str(args.eval_metric)


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> Optimizer:
    """Create the optimizer over `model`'s parameters by timm.

    Raises:
        UserError: timm has no such optimizer, or it does not take an argument.
    """
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (AssertionError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot make the optimizer opt={args.opt!r}: {error}") from error


def load_optimizer(
    args: argparse.Namespace, optimizer: Optimizer, state: dict[str, Any], before: dict[str, Any]
) -> None:
    """Load an optimizer's state of a checkpoint; rates, decay and the like stay as this run was given them.

    Args:
        args: flags of this run.
        optimizer: as made of them.
        state: of `optimizer.state_dict()`, which holds the settings of the run that wrote it too.
        before: flags of that run.
    """
    names = {*SETTINGS, *KINDS, *args.opt_kwargs, *(before.get("opt_kwargs") or {})}
    own = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    place_counts(optimizer)


def make_scheduler(
    args: argparse.Namespace, optimizer: Optimizer, updates_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """Return timm's schedule and the number of epochs with cool-down; it depends only on epoch and update."""
    settings: dict[str, Any] = scheduler_kwargs(args, decreasing_metric=args.eval_metric == "loss")
    scheduler, epochs = create_scheduler_v2(optimizer, **settings, updates_per_epoch=updates_per_epoch)
    if scheduler is None:  # which would apply --layer-decay
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return scheduler, epochs
