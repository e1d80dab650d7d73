"""The task of a training: by itself, with what a model returns beside logits, or from a teacher checked beforehand."""

from collections.abc import Callable
from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from visionzoo.engine.auxiliary import AuxiliaryTask, auxiliary_weights
from visionzoo.engine.errors import NotNamedError, UserError
from visionzoo.engine.flags import DistillationConfig, InputConfig, ModelConfig, TrainConfig
from visionzoo.engine.optimization import make_loss
from visionzoo.engine.restoring import Trained, restore
from visionzoo.engine.scalekd import ScaleKDTask
from visionzoo.engine.trained_flags import WeightsConfig
from visionzoo.text import count_of


def make_task(
    config: TrainConfig,
    model: nn.Module,
    data_config: dict[str, Any],
    class_names: list[str] | None,
    device: torch.device,
) -> TrainingTask:
    """Return timm's task for a model on its device: distillation where `config` names a teacher, else classification.

    Raises:
        UserError: the teacher is missing, has other classes or does not take the images; or the model cannot learn
            from a teacher in the way that is asked for; or as `auxiliary_weights`.
    """
    loss = make_loss(config.augmentation, multi_label=config.data.multi_label).to(device)
    has_teacher = bool(teacher_name(config.distillation))
    if config.distillation.kd_distill_type == "scalekd" and not has_teacher:
        raise UserError("--kd-distill-type scalekd learns from a teacher: give --kd-checkpoint or --kd-model-name")
    weights = auxiliary_weights(
        config.augmentation.aux_weight,
        model,
        config.model.name,
        frozen=config.fit.freeze,
        has_teacher=has_teacher,
    )
    if weights:
        return AuxiliaryTask(model, loss, weights, device)
    if not has_teacher:
        return ClassificationTask(model, loss, device=device, verbose=False)
    restored = _make_teacher(config, data_config["input_size"][0])
    if config.distillation.kd_distill_type != "feature":
        _check_classes(restored, model, class_names)
    mean, std = (_per_channel(data_config[name], device) for name in ("mean", "std"))
    teacher = Teacher(restored, mean, std, device)
    _try_teacher(teacher, data_config["input_size"], device, teacher_name(config.distillation))
    common: dict[str, Any] = {
        "student_model": model,
        "teacher_model": teacher,
        "criterion": loss,
        "distill_loss_weight": config.distillation.distill_loss_weight,
        "task_loss_weight": config.distillation.task_loss_weight,
        "device": device,
        "verbose": False,
    }
    try:
        kind, own = kind_of_distillation(config.distillation)
        if kind is ScaleKDTask:
            own["input_size"] = data_config["input_size"]
        task = kind(**common, **own)
    except ValueError as error:
        raise UserError(
            f"--kd-distill-type {config.distillation.kd_distill_type} with {config.model.model}: {error}"
        ) from error
    # timm takes these from the model's cfg, whatever the images were normalized by; 1.0.29 wraps teachers of tokens
    task.teacher, task.student_mean, task.student_std = teacher, mean, std
    return task


class Teacher(DistillationTeacher):
    """timm's, frozen, which sees images as its own record has them normalized.

    Whether that is another way than the student's is found out once: timm compares the numbers on the device at each
    step, which no CUDA graph can hold.

    Args:
        restored: model and record.
        mean, std: of the student, [1, C, 1, 1].
        device: where it runs.
    """

    def __init__(self, restored: Trained, mean: Tensor, std: Tensor, device: torch.device) -> None:
        super().__init__(restored.model.to(device).requires_grad_(False), device=device)
        self.mean_kd, self.std_kd = (_per_channel(restored.data_config[name], device) for name in ("mean", "std"))
        self.input_size: tuple[int, ...] = tuple(restored.data_config["input_size"])
        self.renormalizes = not (torch.equal(mean, self.mean_kd) and torch.equal(std, self.std_kd))

    def normalize_input(self, input: Tensor, student_mean: Any = None, student_std: Any = None) -> Tensor:
        """Return images that are normalized for the student as the teacher is to see them."""
        if not self.renormalizes:
            return input
        return (input * student_std + student_mean - self.mean_kd) / self.std_kd


def kind_of_distillation(how: DistillationConfig) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the task that learns from a teacher so, and the arguments that only it has."""
    if how.kd_distill_type == "logit":
        return LogitDistillationTask, dict(loss_type=how.kd_loss_type, temperature=how.kd_temperature)
    if how.kd_distill_type == "token":
        return TokenDistillationTask, dict(distill_type=how.kd_token_distill_type, temperature=how.kd_temperature)
    if how.kd_distill_type == "scalekd":
        return ScaleKDTask, dict(temperature=how.kd_temperature, feature_loss_weight=how.kd_feature_weight)
    dims = dict(student_feature_dim=how.kd_student_feature_dim, teacher_feature_dim=how.kd_teacher_feature_dim)
    return FeatureDistillationTask, dims


def teacher_name(distillation: DistillationConfig) -> str:
    """Return what the teacher is called; nothing without one."""
    return " of ".join(filter(None, (distillation.kd_model_name, distillation.kd_checkpoint)))


def describe_teacher(distillation: DistillationConfig, task: Any, input_size: tuple[int, ...]) -> str:
    """Say which teacher a task has, and whether its own images are of another size than the student's."""
    (height, width), own = input_size[-2:], task.teacher.input_size[-2:]
    said = f"distilling from {teacher_name(distillation)} ({distillation.kd_distill_type})"
    if own == (height, width):
        return said
    return f"{said}; its own input is {own[0]} x {own[1]} pixels, it sees the student's {height} x {width}"


def _make_teacher(config: TrainConfig, channels: int) -> Trained:
    name, checkpoint = config.distillation.kd_model_name, config.distillation.kd_checkpoint
    asked = ModelConfig(
        model=name,
        pretrained=not checkpoint,
        in_chans=None if checkpoint else channels,
        non_commercial=config.model.non_commercial,
    )
    try:
        return restore(asked, InputConfig(), WeightsConfig(checkpoint))
    except UserError as error:
        why = str(error)
        if isinstance(error, NotNamedError):
            why = (
                f"{error.what} give a run of `visionzoo train` by --kd-checkpoint, or a file of weights, its model by "
                "--kd-model-name"
            )
        raise UserError(
            f"the teacher {teacher_name(config.distillation)} (--kd-model-name, --kd-checkpoint): {why}"
        ) from error


def _check_classes(teacher: Trained, model: Any, class_names: list[str] | None) -> None:
    advice = "fine-tune the teacher on this data set first, and give its checkpoint by --kd-checkpoint"
    if teacher.num_classes != model.num_classes:
        raise UserError(
            f"the teacher has {count_of(teacher.num_classes, 'class')}, the student {model.num_classes}; {advice}"
        )
    if teacher.class_names and class_names and teacher.class_names != class_names:
        pairs = enumerate(zip(teacher.class_names, class_names, strict=True))
        number, (there, here) = next((i, names) for i, names in pairs if names[0] != names[1])
        raise UserError(
            f"the teacher's classes are not the student's: number {number} is {there!r} there and {here!r} here; "
            f"{advice}, or number the classes by --class-map"
        )


def _try_teacher(teacher: Teacher, input_size: tuple[int, ...], device: torch.device, name: str) -> None:
    image = torch.zeros(1, *input_size, device=device)
    try:
        with torch.no_grad():
            teacher(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"the teacher {name} does not take the student's images, {tuple(input_size)}: {error}; another --img-size, "
            "--in-chans or teacher may work"
        ) from error


def _per_channel(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)
