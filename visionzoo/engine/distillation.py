"""The task of a training: by itself, with what a model returns beside logits, or from a teacher checked beforehand."""

import argparse
from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import Tensor, nn

from visionzoo.engine.auxiliary import AuxiliaryTask, auxiliary_weights
from visionzoo.engine.errors import UserError
from visionzoo.engine.models import Trained, restore
from visionzoo.engine.recipe import make_loss


def make_task(
    args: argparse.Namespace,
    model: nn.Module,
    data_config: dict[str, Any],
    class_names: list[str] | None,
    device: torch.device,
) -> TrainingTask:
    """Return timm's task for a model on its device: distillation where `args` name a teacher, else classification.

    Raises:
        UserError: the teacher is missing, has other classes or does not take the images; or the model cannot learn
            from a teacher in the way that is asked for; or as `auxiliary_weights`.
    """
    loss = make_loss(args).to(device)
    weights = auxiliary_weights(args, model)
    if weights:
        return AuxiliaryTask(model, loss, weights, device)
    if not (args.kd_model_name or args.kd_checkpoint):
        return ClassificationTask(model, loss, device=device, verbose=False)
    teacher = _make_teacher(args, data_config["input_size"][0])
    if args.kd_distill_type != "feature":
        _check_classes(teacher, model, class_names)
    common: dict[str, Any] = {
        "student_model": model,
        "teacher_model": teacher.model.to(device).requires_grad_(False),
        "criterion": loss,
        "distill_loss_weight": args.distill_loss_weight,
        "task_loss_weight": args.task_loss_weight,
        "device": device,
        "verbose": False,
    }
    try:
        task = _distillation_task(args, common)
    except ValueError as error:
        raise UserError(f"--kd-distill-type {args.kd_distill_type} with {args.model}: {error}") from error
    # timm takes these from the models' cfgs, whatever the images were normalized by
    task.student_mean, task.student_std = (_per_channel(data_config[name], device) for name in ("mean", "std"))
    task.teacher.mean_kd, task.teacher.std_kd = (
        _per_channel(teacher.data_config[name], device) for name in ("mean", "std")
    )
    _try_teacher(task, data_config["input_size"], device, teacher_name(args))
    return task


def _distillation_task(args: argparse.Namespace, common: dict[str, Any]) -> Any:
    if args.kd_distill_type == "logit":
        return LogitDistillationTask(**common, loss_type=args.kd_loss_type, temperature=args.kd_temperature)
    if args.kd_distill_type == "token":
        return TokenDistillationTask(**common, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature)
    return FeatureDistillationTask(
        **common,
        student_feature_dim=args.kd_student_feature_dim,
        teacher_feature_dim=args.kd_teacher_feature_dim,
    )


def teacher_name(args: argparse.Namespace) -> str:
    """Return what `args` call the teacher; nothing without one."""
    return " of ".join(filter(None, (args.kd_model_name, args.kd_checkpoint)))


def _make_teacher(args: argparse.Namespace, channels: int) -> Trained:
    asked = argparse.Namespace(
        model=args.kd_model_name,
        checkpoint=args.kd_checkpoint,
        pretrained=True,
        in_chans=None if args.kd_checkpoint else channels,
        model_kwargs={},
        num_classes=None,
        gp=None,
        img_size=None,
        input_size=None,
        no_ema=False,
        non_commercial=args.non_commercial,
    )
    try:
        return restore(asked)
    except UserError as error:
        raise UserError(f"the teacher {teacher_name(args)} (--kd-model-name, --kd-checkpoint): {error}") from error


def _check_classes(teacher: Trained, model: Any, class_names: list[str] | None) -> None:
    advice = "fine-tune the teacher on this data set first, and give its checkpoint by --kd-checkpoint"
    if teacher.num_classes != model.num_classes:
        raise UserError(f"the teacher has {teacher.num_classes} classes, the student {model.num_classes}; {advice}")
    if teacher.class_names and class_names and teacher.class_names != class_names:
        pairs = enumerate(zip(teacher.class_names, class_names, strict=True))
        number, (there, here) = next((i, names) for i, names in pairs if names[0] != names[1])
        raise UserError(
            f"the teacher's classes are not the student's: number {number} is {there!r} there and {here!r} here; "
            f"{advice}, or number the classes by --class-map"
        )


def _try_teacher(task: Any, input_size: tuple[int, ...], device: torch.device, name: str) -> None:
    image = torch.zeros(1, *input_size, device=device)
    try:
        with torch.no_grad():
            task.teacher(task.teacher.normalize_input(image, task.student_mean, task.student_std))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"the teacher {name} does not take the student's images, {tuple(input_size)}: {error}; another --img-size, "
            "--in-chans or teacher may work"
        ) from error


def _per_channel(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)
