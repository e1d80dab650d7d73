"""Flags of a training that have no effect beside the others that are given: a run says so at its start."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from timm.data import create_transform
from torch import nn
from torchvision.transforms import Normalize

from visionzoo.engine.data import transform_settings
from visionzoo.engine.distillation import kind_of_distillation
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import AugmentationConfig, ScheduleConfig, TrainConfig
from visionzoo.engine.optimization import learning_rate, make_optimizer, make_scheduler
from visionzoo.engine.options import FLAG, changed, settings

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
    ("mixup",): ("mixup_switch_prob",),
    ("cutmix", "cutmix_minmax"): ("mixup_switch_prob",),
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
    ("resume",): ("no_resume_opt",),
    ("log_wandb",): ("wandb_project", "wandb_tags", "wandb_resume_id"),
}
STREAMS = ("hfids/", "tfds/", "wds/")  # data sets of timm's that are read from front to back
UPDATES = 2  # an epoch, at which learning rates are compared


def idle_flags(config: TrainConfig) -> str:
    """Return words on the flags that are given and have no effect; nothing where there are none."""
    given, usual = settings(config), settings(type(config)())
    idle = {}
    for name in (name for name in given if given[name] != usual[name]):
        waiting = (owners for owners, names in OF.items() if name in names)
        if off := next((owners for owners in waiting if all(given[owner] == usual[owner] for owner in owners)), ()):
            idle[name] = f"without {' or '.join(map(_dashed, off))}"
        elif given[name] and (decider := _decider(config, name, usual)):  # 0 turns off what is off then: no mistake
            idle[name] = f"under {_dashed(decider)}{_shown(given[decider])}"
    return f"without effect: {', '.join(f'{_dashed(name)} ({why})' for name, why in idle.items())}" if idle else ""


def _decider(config: TrainConfig, name: str, usual: dict[str, Any]) -> str:
    """Return the flag under which another one has no effect, the first that suffices; nothing where it has one."""
    steps = _READ.get(name, ())

    def is_idle(make: Callable[[TrainConfig], Any], usually: Sequence[str]) -> bool:
        read = changed(config, **{other: usual[other] for other in usually if other != name})
        others = _others(name, settings(read)[name], usual[name])
        return _alike(make, read, *(changed(read, **{name: other}) for other in others))

    if not steps or not is_idle(steps[-1][0], ()):
        return ""
    deciders = [decider for _, decider in steps]
    return next(deciders[i] for i, (make, _) in enumerate(steps) if is_idle(make, deciders[i + 1 :]))


def _others(name: str, given: Any, usual: Any) -> Sequence[Any]:
    """Return other values of a flag: its choices, the usual one, or where that is up to the library one nearer to 1."""
    if name in _CHOICES:
        return _CHOICES[name]
    if usual is not None or isinstance(given, str):
        return [usual]
    return [[(value + 1) / 2 for value in given] if isinstance(given, Sequence) else (given + 1) / 2]


def _alike(make: Callable[[TrainConfig], Any], *configs: TrainConfig) -> bool:
    """Say whether the same is made of configurations; not where one cannot be made, which is refused elsewhere."""
    try:
        first, *others = map(make, configs)
    except (UserError, ValueError, AssertionError, ImportError, RuntimeError):
        return False
    return all(first == other for other in others)


def _optimizer(config: TrainConfig) -> Any:
    optimizer = make_optimizer(config.optimizer, 1.0, nn.Linear(1, 1))
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _schedule(config: TrainConfig) -> Any:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, epochs = make_scheduler(config.schedule, optimizer, UPDATES, seed=0)
    return epochs, {key: value for key, value in vars(scheduler or object).items() if key != "optimizer"}


def _rates(config: TrainConfig) -> Any:
    """Return the learning rate at each update of the run."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, epochs = make_scheduler(config.schedule, optimizer, UPDATES, seed=0)
    rates = []
    for update in range(UPDATES * epochs):
        if scheduler and update:
            scheduler.step_update(update)
            if update % UPDATES == 0:
                scheduler.step(update // UPDATES)
        rates.append(optimizer.param_groups[0]["lr"])
    return epochs, rates


def _base_rate(config: TrainConfig) -> Any:
    return learning_rate(config.schedule, config.optimizer.opt, 7)[0]


def _transform(config: TrainConfig) -> Any:
    """Return what is done to training images, by its attributes; `repr` does not name all of them."""
    settings = transform_settings(config.augmentation, {"interpolation": "bicubic"})
    transform: Any = create_transform(224, is_training=True, **settings)
    own = 1 if config.augmentation.crop_padding else 0  # with a crop of its own in place of timm's
    taken = config.data.cache_images and config.augmentation.train_interpolation  # of which only one is accepted
    return taken, pickle.dumps([step for step in transform.transforms[own:] if not isinstance(step, Normalize)])


def _taught(config: TrainConfig) -> Any:
    return kind_of_distillation(config.distillation)


def _mixed(config: TrainConfig) -> Any:
    last = config.augmentation.mixup_off_epoch
    return last if last < _schedule(config)[0] else 0


def _streamed(config: TrainConfig) -> Any:
    parts = config.splits
    is_stream = config.data.dataset.startswith(STREAMS)
    return is_stream and (parts.train_num_samples, parts.val_num_samples, parts.epoch_repeats)


def _validated(config: TrainConfig) -> Any:
    parts = config.splits
    return parts.val_split and (parts.val_data_dir, parts.eval_metric, config.fit.validation_batch_size)


def _size(config: TrainConfig) -> Any:
    return config.input.input_size or config.input.img_size


def _weights(config: TrainConfig) -> Any:
    return config.fit.initial_checkpoint or (config.fit.pretrained_path, config.model.pretrained)


_BASE = ("lr_base", "lr_base_size", "lr_base_scale")
_SCHEDULE = {field.name for field in fields(ScheduleConfig)} - {"lr", "sched", "epochs", *_BASE}
_CHOICES = {
    field.name: field.metadata[FLAG][1]["choices"]
    for part in (ScheduleConfig, AugmentationConfig)
    for field in fields(part)
    if "choices" in field.metadata[FLAG][1]
}
_TRANSFORM = (
    *("train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter", "color_jitter_prob", "grayscale_prob"),
    *("gaussian_blur_prob", "aa", "reprob", "remode", "recount", "train_interpolation"),
)
# flags -> what they take part in making, by which it is seen whether they do, and which flag decides that; where there
# are several, each decides beside those before it, and the last is made of all
_READ: dict[str, tuple[tuple[Callable[[TrainConfig], Any], str], ...]] = {
    **dict.fromkeys(("momentum", "opt_eps", "opt_betas"), ((_optimizer, "opt"),)),
    **dict.fromkeys(_SCHEDULE, ((_schedule, "sched"), (_rates, "epochs"), (_rates, "warmup_epochs"))),
    **dict.fromkeys(_BASE, ((_base_rate, "lr"),)),
    **dict.fromkeys(_TRANSFORM, tuple((_transform, name) for name in ("no_aug", "crop_padding", "aa", "color_jitter"))),
    **dict.fromkeys(
        (
            "kd_temperature",
            "kd_token_distill_type",
            "kd_feature_weight",
            "kd_student_feature_dim",
            "kd_teacher_feature_dim",
        ),
        ((_taught, "kd_distill_type"),),
    ),
    **dict.fromkeys(("train_num_samples", "val_num_samples", "epoch_repeats"), ((_streamed, "dataset"),)),
    **dict.fromkeys(("val_data_dir", "eval_metric", "validation_batch_size"), ((_validated, "val_split"),)),
    "mixup_off_epoch": ((_mixed, "epochs"),),
    "img_size": ((_size, "input_size"),),
    **dict.fromkeys(("pretrained", "pretrained_path"), ((_weights, "initial_checkpoint"),)),
}


def _shown(value: Any) -> str:
    """Return a value as it stands behind its flag."""
    values = value if isinstance(value, list) else [] if value is True else [value]
    return "".join(f" {part if part != '' else repr(part)}" for part in values)


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"
