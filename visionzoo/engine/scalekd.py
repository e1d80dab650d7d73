"""`--kd-distill-type scalekd`: timm's task of features, with ScaleKD's projectors, losses and use of the teacher.

Facts from https://github.com/deep-optimization/ScaleKD at 478a7db (Apache-2.0), classifiers/distiller.py and
`forward_specific_stage` of its backbones; losses and projectors are in `visionzoo.layers.mimicking`. A student's map
from three quarters of its way and its last one are each projected twice, for the view of places and that of
frequencies; the first ones pass the teacher's later parts (teacher parameter perception) and are the queries of the
second ones. Where we differ: both maps of an isotropic student have its last norm (theirs: the second one), and the
teacher's prefix tokens are no part of what passes through it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from timm.task import FeatureDistillationTask
from timm.task.distillation import FeatureDistillationTrainableModule
from timm.utils import unwrap_model
from torch import Tensor, nn

from visionzoo.layers.mimicking import FREQUENCY, SPATIAL, CrossAttentionProjector, frequency_loss, spatial_loss
from visionzoo.layers.tokens import Tokens
from visionzoo.models._isotropic import Isotropic
from visionzoo.models._pyramid import Pyramid
from visionzoo.text import count_of

HEADS = (8, 6, 4, 3, 2, 1)  # of attention: the first number that divides the teacher's channels


class Perception:
    """The later parts of a teacher, through which a student's maps pass; no module, so that no one owns the weights.

    Of an isotropic teacher they are two runs of blocks: a quarter of all, and after them the last one with the norm. Of
    a hierarchical one the first run is the last stage with its norm, and there is no second.

    Args:
        teacher: a hierarchical or isotropic model of the zoo, or timm's `VisionTransformer`.

    Raises:
        ValueError: it is of another kind, or has one part only.
    """

    def __init__(self, teacher: nn.Module) -> None:
        if not isinstance(teacher, Pyramid | Isotropic | VisionTransformer):
            raise ValueError(
                f"the teacher is a {type(teacher).__name__}; its later parts must be blocks of tokens or stages of "
                "maps: take a plain or hierarchical zoo_* model, such as zoo_deit_s or zoo_swin_t, or a ViT of timm"
            )
        self.teacher: Any = teacher
        parts = len(teacher.blocks if isinstance(teacher, VisionTransformer) else teacher.parts)
        if parts < 2:
            raise ValueError(f"the teacher has {count_of(parts, 'block or stage', 'blocks or stages')}, expected two")
        self.last = parts - 1
        self.hierarchical = isinstance(teacher, Pyramid)
        self.first = range(self.last, parts) if self.hierarchical else range(self.last - max(1, parts // 4), self.last)
        later = () if self.hierarchical else (*self.first, self.last)
        blocks = [teacher.get_submodule(f"blocks.{index}") for index in later]
        if any(getattr(block, "reducer", None) for block in blocks):
            raise ValueError(
                "the teacher leaves tokens out in its later blocks, which the student's would lack; take one without "
                "reducers there"
            )

    def describe(self) -> str:
        """Say which parts they are, counted from 0."""
        if self.hierarchical:
            return f"its stage {self.last}"
        first = f"block {self.first[0]}" if len(self.first) == 1 else f"blocks {self.first[0]} to {self.first[-1]}"
        return f"its {first}, then {self.last}"

    def see(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits [B, K] and last map [B, H, W, C], normalized."""
        features, (found,) = self.teacher.forward_intermediates(image, indices=[self.last], norm=True)
        return self.teacher.forward_head(features), found.permute(0, 2, 3, 1)

    def entrance(self, image: Tensor) -> tuple[int, ...]:
        """Return height, width and channels of the teacher's map before the first run."""
        found = self.teacher.forward_intermediates(image, indices=[self.first[0] - 1], intermediates_only=True)[0]
        return tuple(found.permute(0, 2, 3, 1).shape[1:])

    def perceive(self, x: Tensor) -> Tensor:
        """Take a map [B, H, W, C] like the one at the entrance through the first run."""
        return self._run(x, self.first, norm=self.hierarchical)

    def conclude(self, x: Tensor) -> Tensor:
        """Take a map [B, H, W, C] like the teacher's last through the second run."""
        return x if self.hierarchical else self._run(x, range(self.last, self.last + 1), norm=True)

    def _run(self, x: Tensor, parts: range, norm: bool) -> Tensor:
        teacher = self.teacher
        if isinstance(teacher, VisionTransformer):
            tokens = x.flatten(1, 2)
            for part in parts:
                tokens = teacher.blocks[part](tokens)
            return (teacher.norm(tokens) if norm else tokens).unflatten(1, x.shape[1:3])
        state: Any = x.permute(0, 3, 1, 2) if self.hierarchical else Tokens.of(x)
        for part in parts:
            state = teacher.advance(part, state)
        return teacher.read(parts[-1], state, norm)[0]


class _Stage(nn.Module):
    """The projectors of one of the student's maps: for the view of places, and for that of frequencies."""

    def __init__(self, dim: int, size: tuple[int, int], target: tuple[int, ...], own_query: bool) -> None:
        super().__init__()
        height, width, channels = target
        heads = next(number for number in HEADS if channels % number == 0)
        self.spatial, self.frequency = (
            CrossAttentionProjector(dim, channels, size, (height, width), num_heads=heads, own_query=own_query)
            for _ in range(2)
        )

    def forward(self, x: Tensor, queries: tuple[Tensor | None, Tensor | None] = (None, None)) -> tuple[Tensor, Tensor]:
        """[B, c, h, w] to two maps [B, H, W, C]."""
        return self.spatial(x, queries[0]), self.frequency(x, queries[1])


class ScaleKDModule(FeatureDistillationTrainableModule):
    """A student with its projectors, which learn together.

    Args:
        student: any model that has timm's `forward_intermediates`, with two features or more.
        perception: of the teacher.
        input_size: channels, height and width of the student's images.

    Raises:
        ValueError: the student has fewer features, or the teacher does not take what it is to be given.
    """

    def __init__(self, student: nn.Module, perception: Perception, input_size: tuple[int, ...]) -> None:
        super().__init__(student)
        self.features = _features(student)
        like = next(student.parameters())
        image = like.new_zeros(1, *input_size)
        training = student.training
        student.eval()
        with torch.no_grad():
            _, maps = self._student(image)
            entrance, (_, last) = perception.entrance(image), perception.see(image)
            try:
                perceived = perception.perceive(like.new_zeros(1, *entrance))
                perception.conclude(perceived)
            except (AttributeError, TypeError) as error:  # the state between its parts is no map of tokens
                raise ValueError(
                    f"the later parts of a {type(perception.teacher).__name__} do not take a map by itself, they need "
                    "pixels, memories or other branches beside it; take another, such as zoo_deit_s or zoo_swin_t"
                ) from error
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ValueError(f"the teacher's later parts do not take a map by itself: {error}") from error
        student.train(training)
        if perceived.shape != last.shape:
            raise ValueError(
                f"the teacher's later parts make {tuple(perceived.shape[1:])} of a map {entrance}, expected its last "
                f"map's {tuple(last.shape[1:])}"
            )
        targets = (entrance, tuple(last.shape[1:]))
        self.projection: Any = nn.ModuleList(
            _Stage(x.shape[1], (x.shape[2], x.shape[3]), target, own_query=not i)
            for i, (x, target) in enumerate(zip(maps, targets, strict=True))
        ).to(like)

    def forward(self, input: Tensor, perception: Perception) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:  # type: ignore[override]
        """Images to logits, and for each of two maps its two views [B, H, W, C] in the teacher's last map's place."""
        logits, maps = self._student(input)
        first, second = self.projection
        perceived = [perception.perceive(x) for x in first(maps[0])]
        projected = [perception.conclude(x) for x in second(maps[1], tuple(perceived))]
        return logits, [(perceived[0], perceived[1]), (projected[0], projected[1])]

    def _student(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        student: Any = self.student
        end, maps = student.forward_intermediates(image, indices=self.features, norm=True)
        return student.forward_head(end), maps


def _features(student: Any) -> list[int]:
    """Return which two features of a student are projected: the last, and that before it or at three quarters."""
    if not hasattr(student, "forward_intermediates") or not hasattr(student, "feature_info"):
        raise ValueError(f"{type(student).__name__} does not give the maps inside it; take another model")
    reductions = [info["reduction"] for info in student.feature_info]
    count = len(reductions)
    if count < 2:
        raise ValueError(f"the student has {count_of(count, 'stage or block', 'stages or blocks')}, expected two")
    return [count - 2 if reductions[-2] != reductions[-1] else max(0, 3 * count // 4 - 1), count - 1]


class ScaleKDTask(FeatureDistillationTask):
    """Cross-entropy, timm's logit distillation and ScaleKD's four losses of features.

    `loss` is task_loss_weight x `task_loss` + distill_loss_weight x `kd_loss` + feature_loss_weight x `feature_loss`.
    The published one has both of the first weights 0.5, temperature 1 and the third weight 1.

    Args:
        student_model: see `ScaleKDModule`.
        teacher_model: see `Perception`; or timm's `DistillationTeacher` around it. Frozen, in evaluation.
        input_size: channels, height and width of the images.
        temperature: of the softmax over logits.
        feature_loss_weight: factor of the losses of features.
        common: further arguments of timm's task.

    Raises:
        ValueError: student or teacher cannot.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: nn.Module,
        *,
        input_size: tuple[int, ...],
        temperature: float,
        feature_loss_weight: float,
        **common: Any,
    ) -> None:
        # of equal widths, so that timm makes no projection
        super().__init__(student_model, teacher_model, student_feature_dim=1, teacher_feature_dim=1, **common)
        teacher: Any = self.teacher
        self.perception = Perception(teacher.model)
        self.temperature, self.feature_loss_weight = temperature, feature_loss_weight
        self.trainable_module = ScaleKDModule(student_model, self.perception, input_size)

    def describe(self) -> str:
        """Say which parts of student and teacher take part, and how large the projectors are."""
        module: Any = unwrap_model(self.trainable_module)
        size = sum(p.numel() for p in module.projection.parameters()) / 1e6
        places = " and ".join(str(i) for i in module.features)
        return (
            f"ScaleKD: the student's features {places}, through the teacher's parts: {self.perception.describe()}; "
            f"projectors of {size:.2f} M parameters, which only the training has"
        )

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return `loss`, `output` (logits), `task_loss`, `kd_loss` and `feature_loss`."""
        trainable: Any = self.trainable_module
        teacher: Any = self.teacher
        logits, maps = trainable(input, self.perception)
        task_loss = self.criterion(logits, target)
        with torch.no_grad():
            seen = teacher.normalize_input(input, self.student_mean, self.student_std)
            teacher_logits, last = self.perception.see(seen)
        kd_loss = logit_loss(logits, teacher_logits, self.temperature)
        feature_loss = feature_losses(maps, last)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {
            "loss": loss + self.feature_loss_weight * feature_loss,
            "output": logits,
            "task_loss": task_loss,
            "kd_loss": kd_loss,
            "feature_loss": feature_loss,
        }


def logit_loss(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the divergence of a teacher's softened probabilities from a student's, as timm's distillation has it.

    The authors' is the cross-entropy of both: larger by the entropy of the teacher, of the same gradients.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)  # autocast on a CPU leaves it narrow
    own, theirs = (F.log_softmax(x.to(dtype) / temperature, dim=-1, dtype=dtype) for x in (logits, target))
    return F.kl_div(own, theirs, reduction="batchmean", log_target=True) * temperature**2


def feature_losses(maps: list[tuple[Tensor, Tensor]], last: Tensor) -> Tensor:
    """Return the sum of the weighted losses of pairs of views against the teacher's last map [B, H, W, C]."""
    parts = [SPATIAL * spatial_loss(x, last) + FREQUENCY * frequency_loss(y, last) for x, y in maps]
    return torch.stack(parts).sum()
