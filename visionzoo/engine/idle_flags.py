"""Flags of a training that have no effect beside the others that are given: a run says so at its start."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import ScheduleConfig, TrainConfig
from visionzoo.engine.optimization import learning_rate, make_optimizer, make_scheduler
from visionzoo.engine.options import changed, settings

OF: dict[tuple[str, ...], tuple[str, ...]] = {  # flags, one of which must be on -> those that act beside it
    ("amp",): ("amp_dtype",),
    ("model_ema",): ("model_ema_decay", "model_ema_warmup"),
    ("quantize_anneal",): ("quantize_margin",),
    ("clip_grad",): ("clip_mode",),
    ("layer_decay",): ("layer_decay_min_scale", "layer_decay_no_opt_scale"),
    ("lr_noise",): ("lr_noise_pct", "lr_noise_std"),
    ("lr_cycle_limit",): ("lr_cycle_mul", "lr_cycle_decay"),
    ("reprob",): ("remode", "recount"),
    ("mixup", "cutmix", "cutmix_minmax"): ("mixup_prob", "mixup_mode", "mixup_off_epoch"),
    ("bce_loss", "multi_label"): ("bce_sum", "bce_pos_weight"),
    ("bce_loss",): ("bce_target_thresh",),
    ("kd_checkpoint", "kd_model_name"): (
        "kd_distill_type",
        "kd_token_distill_type",
        "kd_temperature",
        "kd_feature_weight",
        "kd_student_feature_dim",
        "kd_teacher_feature_dim",
        "task_loss_weight",
        "distill_loss_weight",
    ),
    ("log_wandb",): ("wandb_project", "wandb_tags", "wandb_resume_id"),
}
BESIDE: dict[str, tuple[str, ...]] = {  # a flag -> those that it leaves nothing to do
    "initial_checkpoint": ("pretrained", "pretrained_path"),
    "crop_padding": ("scale", "ratio"),
    "no_aug": (
        "train_crop_mode",
        "scale",
        "ratio",
        "hflip",
        "vflip",
        "color_jitter",
        "color_jitter_prob",
        "grayscale_prob",
        "gaussian_blur_prob",
        "aa",
        "reprob",
        "train_interpolation",
    ),
}


def idle_flags(config: TrainConfig) -> str:
    """Return words on the flags that are given and have no effect; nothing where there are none."""
    given, usual = settings(config), settings(TrainConfig())  # multi-task training has some of its own
    owned = {name: owners for owners, names in OF.items() for name in names}
    idle = {}
    for name in (name for name in given if name in usual and given[name] != usual[name]):
        owners = owned.get(name, ())
        if owners and all(given[owner] == usual[owner] for owner in owners):
            idle[name] = f"without {' or '.join(map(_dashed, owners))}"
        elif (read := _READ.get(name)) and _alike(
            read[0], config, changed(config, **{name: _other(given[name], usual[name])})
        ):
            idle[name] = f"under {_dashed(read[1])} {given[read[1]]}"
        elif given[name] and (others := [other for other in BESIDE if name in BESIDE[other] and given[other]]):
            idle[name] = f"beside {_dashed(others[0])}"  # a value of 0 turns off what is off then, and is no mistake
    return f"without effect: {', '.join(f'{_dashed(name)} ({why})' for name, why in idle.items())}" if idle else ""


def _other(given: Any, usual: Any) -> Any:
    """Return another value of a flag: the usual one, or where that is up to the library one nearer to 1."""
    if usual is not None:
        return usual
    return [(value + 1) / 2 for value in given] if isinstance(given, Sequence) else (given + 1) / 2


def _alike(made: Callable[[TrainConfig], Any], *configs: TrainConfig) -> bool:
    """Say whether the same is made of two configurations; not where one cannot be made, which is refused elsewhere."""
    try:
        one, other = map(made, configs)
    except (UserError, ValueError, AssertionError, ImportError, RuntimeError):
        return False
    return bool(one == other)


def _optimizer(config: TrainConfig) -> Any:
    optimizer = make_optimizer(config.optimizer, 1.0, nn.Linear(1, 1))
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _schedule(config: TrainConfig) -> Any:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, epochs = make_scheduler(config.schedule, optimizer, 7, seed=0)
    return epochs, {key: value for key, value in vars(scheduler or object).items() if key != "optimizer"}


def _learning_rate(config: TrainConfig) -> Any:
    return learning_rate(config.schedule, config.optimizer.opt, 7)[0]


_SCHEDULE = {field.name for field in fields(ScheduleConfig)} - {"lr", "sched", "epochs"}
_BASE = {"lr_base", "lr_base_size", "lr_base_scale"}
# flags -> what they take part in making, by which it is seen whether they do, and which flag decides that
_READ: dict[str, tuple[Callable[[TrainConfig], Any], str]] = {
    **dict.fromkeys(("momentum", "opt_eps", "opt_betas"), (_optimizer, "opt")),
    **dict.fromkeys(_SCHEDULE - _BASE, (_schedule, "sched")),
    **dict.fromkeys(_BASE, (_learning_rate, "lr")),
}


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"
