"""What mmseg's losses lack."""

from __future__ import annotations

from functools import partial
from typing import Any

from mmseg.models.losses import CrossEntropyLoss
from torch import Tensor, nn


def allow_unlabelled_batches(model: nn.Module) -> None:
    """Let binary cross-entropies be 0 on a batch of which no pixel is labeled; mmseg's ends in an error of `max()`."""
    for module in model.modules():
        if isinstance(module, CrossEntropyLoss) and module.use_sigmoid:
            module.cls_criterion = partial(_of_labelled, module.cls_criterion)


def _of_labelled(criterion: Any, prediction: Tensor, label: Tensor, *args: Any, **more: Any) -> Tensor:
    if more.get("reduction") != "none" and bool((label == more.get("ignore_index", -100)).all()):
        return prediction.sum() * 0  # with a gradient, which other processes wait for
    loss: Tensor = criterion(prediction, label, *args, **more)
    return loss
