"""Linear probing: the classifier alone is trained, on features of weights that stay as they are."""

import argparse
from typing import Any

from torch import nn

from visionzoo.engine.errors import UserError
from visionzoo.models._memory import memory_tensors


def freeze(args: argparse.Namespace, model: nn.Module) -> None:
    """Let only the classifier of a model have gradients, and its memory.

    Raises:
        UserError: the model has none, or nothing gives its features weights.
    """
    if not (args.pretrained or args.pretrained_path or args.initial_checkpoint or args.resume):
        raise UserError(
            "--freeze trains the classifier alone, on features of random weights; give --pretrained, --pretrained-path "
            "or --initial-checkpoint"
        )
    parts = classifiers(model)
    if not any(list(part.parameters()) for part in parts):
        raise UserError(f"--freeze: {args.model} has no classifier to train; give --num-classes")
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    for name in memory_tensors(model):
        model.get_parameter(name).requires_grad_(True)


def train_mode(model: nn.Module, frozen: bool) -> None:
    """Set a model to training; where it is frozen, all but the classifier behaves as in evaluation."""
    model.train(not frozen)
    if frozen:
        inner: Any = model
        while not hasattr(inner, "get_classifier"):  # DDP, torch.compile, or what learns features from a teacher
            inner = next(inner.children())
        for part in classifiers(inner):
            part.train()


def classifiers(model: Any) -> list[nn.Module]:
    """Return the modules that make logits of features; models that learned from a teacher may have two."""
    found = model.get_classifier()
    return list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
