"""Flags of a training that act only beside another, which is not given: a run says so at its start."""

from visionzoo.engine.flags import TrainConfig
from visionzoo.engine.options import settings

OF: dict[tuple[str, ...], tuple[str, ...]] = {  # flags, one of which must be on -> those that act beside it
    ("amp",): ("amp_dtype",),
    ("model_ema",): ("model_ema_decay", "model_ema_warmup"),
    ("quantize_anneal",): ("quantize_margin",),
    ("clip_grad",): ("clip_mode",),
    ("layer_decay",): ("layer_decay_min_scale", "layer_decay_no_opt_scale"),
    ("lr_noise",): ("lr_noise_pct", "lr_noise_std"),
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


def idle_flags(config: TrainConfig) -> str:
    """Return words on the flags that are given and have no effect; nothing where there are none."""
    given, usual = settings(config), settings(TrainConfig())
    idle = [
        f"{_dashed(name)} (without {' or '.join(map(_dashed, owners))})"
        for owners, names in OF.items()
        if all(given[owner] == usual[owner] for owner in owners)
        for name in names
        if given[name] != usual[name]
    ]
    return f"without effect: {', '.join(idle)}" if idle else ""


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"
