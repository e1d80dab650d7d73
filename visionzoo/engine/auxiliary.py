"""Training on what a model returns beside logits: exits, and named terms of the loss."""

import argparse
from collections.abc import Mapping
from typing import Any

from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask
from torch import Tensor, nn

from visionzoo.engine.errors import UserError, closest
from visionzoo.engine.flags import AMOUNT

TAKEN = ("loss", "output", "task_loss", "lr", "images_per_second")  # names that the log has for something else


class AuxiliaryTask(ClassificationTask):
    """timm's classification with the loss of the logits, plus weight times loss of each exit and value of each term.

    Args:
        model: asked for its `visionzoo.layers.outputs.Outputs` from now on.
        criterion: of the logits and the exits, against the labels.
        weights: of each exit and term, by name.
        device: of the model.
    """

    def __init__(self, model: Any, criterion: nn.Module, weights: dict[str, float], device: Any) -> None:
        super().__init__(model, criterion, device=device, verbose=False)
        model.set_auxiliary()
        self.weights = weights
        smooths = isinstance(criterion, LabelSmoothingCrossEntropy)  # which only takes labels
        self.soft_criterion = SoftTargetCrossEntropy() if smooths else criterion

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Return `loss`, `output` (logits), `task_loss` (of the logits), and each exit's loss and term by its name.

        Raises:
            ValueError: the model does not return just the exits and terms that it declares.
        """
        logits, exits, terms = self.trainable_module(input)
        parts = list(terms.items())
        for name, logits_there, own in exits:
            loss = self.criterion(logits_there, target) if own is None else self.soft_criterion(logits_there, own)
            parts.append((name, loss))
        if sorted(name for name, _ in parts) != sorted(self.weights):
            raise ValueError(
                f"the model declares in AUXILIARY the exits and terms {sorted(self.weights)}, and returned "
                f"{sorted(name for name, _ in parts)}; each must come exactly once"
            )
        loss = task_loss = self.criterion(logits, target)
        for name, value in parts:
            loss = loss + self.weights[name] * value  # also with 0: a gradient of zeros is one that DDP can share
        return {"loss": loss, "output": logits, "task_loss": task_loss, **dict(parts)}


def auxiliary_weights(
    given: Mapping[str, Any], model: Any, model_name: str, *, frozen: bool, has_teacher: bool
) -> dict[str, float]:
    """Return the weights of the exits and terms that a model is to be trained on: its own, or those of --aux-weight.

    Args:
        given: by --aux-weight.
        model: that has them.
        model_name: for messages.
        frozen: whether only its classifier is trained.
        has_teacher: whether it learns from another model.

    Raises:
        UserError: --aux-weight names what the model does not have, or a weight is not a number from 0; or there is a
            teacher, or only the classifier is trained, and they have no place.
    """
    own = model.auxiliary_weights() if hasattr(model, "auxiliary_weights") else {}
    if taken := sorted(set(own) & set(TAKEN)):
        raise ValueError(f"AUXILIARY of {model_name}: {taken[0]!r} is a name that the log has for something else")
    for name, weight in given.items():
        if not own:
            raise UserError(f"--aux-weight {name}={weight}: {model_name} as built has no exits and no terms")
        if name not in own:
            near, listed = closest(name, own), ", ".join(own)
            raise UserError(f"--aux-weight: {model_name} has no exit and no term {name!r}{near or ';'} it has {listed}")
        try:
            own[name] = AMOUNT(str(weight))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise UserError(f"--aux-weight {name}: expected a number at least 0, got {weight!r}") from error
    if frozen:
        if given:
            raise UserError("--freeze trains only the classifier, without exits and terms; leave --aux-weight out")
        return {}
    if has_teacher:
        if learned := [name for name, weight in own.items() if weight]:
            raise UserError(
                f"{model_name} learns from labels with {', '.join(learned)} in its loss, which a teacher has "
                "no place for; leave the teacher out, or these: --aux-weight "
                f"{' '.join(f'{name}=0' for name in learned)}"
            )
        return {}
    return dict(own)
