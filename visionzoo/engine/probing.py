"""Probing: the classifier, or a head in its place, is all that is trained, on features of frozen weights."""

import argparse
from typing import Any

from torch import nn

from visionzoo.engine.errors import UserError
from visionzoo.models._memory import memory_tensors


def choose_head(args: argparse.Namespace) -> None:
    """Put the head that --probe or --head names into `args.model_kwargs`, where the record of the run has it.

    Raises:
        UserError: the flags contradict each other, or the model takes no other head.
    """
    if args.probe and not args.freeze:
        raise UserError(
            f"--probe {args.probe} is what --freeze trains on a model that stays as it is: add --freeze; to train the "
            "whole model with such a head, give --head in place of --probe"
        )
    if args.probe and args.head:
        raise UserError(f"--probe {args.probe} together with --head {args.head}: a model has one head; give one")
    name = args.head or (args.probe if args.probe != "linear" else None)
    if name is None:
        if args.head_kwargs:
            given = ", ".join(f"{key}={value!r}" for key, value in args.head_kwargs.items())
            where = "--probe linear has none" if args.probe else "give --probe or --head too"
            raise UserError(f"--head-kwargs {given} are options of a head: {where}")
        return
    if not args.model.startswith("zoo_") and ":" not in args.model:
        raise UserError(f"a head named {name!r} can be put onto zoo_* models, {args.model} is timm's own; leave it out")
    head = {"type": name, **args.head_kwargs}
    if args.model_kwargs.get("head", head) != head:
        raise UserError(f"--model-kwargs head={args.model_kwargs['head']!r} beside {head}; give one of them")
    args.model_kwargs = {**args.model_kwargs, "head": head}


def freeze(args: argparse.Namespace, model: nn.Module) -> None:
    """Let only the classifier of a model, or the head put onto it, and its memory have gradients.

    Raises:
        UserError: the model has none, or nothing gives its features weights.
    """
    if not (args.pretrained or args.pretrained_path or args.initial_checkpoint or args.resume):
        raise UserError(
            "--freeze trains only the classifier, on features of random weights; give --pretrained, --pretrained-path "
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
    if getattr(model, "head_reads_map", False):  # a head put onto the model, which learns as a whole
        return [model.head]
    found = model.get_classifier()
    return list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
