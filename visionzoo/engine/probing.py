"""Probing: the classifier, or a head in its place, is all that is trained, on features of frozen weights."""

import dataclasses
from typing import Any

from torch import nn

from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import CompiledModelConfig, FitConfig
from visionzoo.models._memory import memory_tensors


def choose_head(fit: FitConfig, model: CompiledModelConfig) -> CompiledModelConfig:
    """Return a model with the head that --probe or --head names in its arguments, where the record of the run has it.

    Raises:
        UserError: the flags contradict each other, or the model takes no other head.
    """
    if fit.probe and not fit.freeze:
        raise UserError(
            f"--probe {fit.probe} is what --freeze trains on a model that stays as it is: add --freeze; to train the "
            "whole model with such a head, give --head in place of --probe"
        )
    if fit.probe and fit.head:
        raise UserError(f"--probe {fit.probe} together with --head {fit.head}: a model has one head; give one")
    name = fit.head or (fit.probe if fit.probe != "linear" else None)
    if name is None:
        if fit.head_kwargs:
            given = ", ".join(f"{key}={value!r}" for key, value in fit.head_kwargs.items())
            where = "--probe linear has none" if fit.probe else "give --probe or --head too"
            raise UserError(f"--head-kwargs {given} are options of a head: {where}")
        return model
    if not model.name.startswith("zoo_") and ":" not in model.name:
        raise UserError(
            f"a head named {name!r} can be put onto zoo_* models, {model.model} is timm's own; leave it out"
        )
    head = {"type": name, **fit.head_kwargs}
    if model.model_kwargs.get("head", head) != head:
        raise UserError(f"--model-kwargs head={model.model_kwargs['head']!r} beside {head}; give one of them")
    return dataclasses.replace(model, model_kwargs={**model.model_kwargs, "head": head})


def freeze(model: nn.Module, name: str, *, has_weights: bool) -> None:
    """Let only the classifier of a model, or the head put onto it, and its memory have gradients.

    Args:
        model: its parameters are changed.
        name: of the model, for the message.
        has_weights: whether something gives its features weights.

    Raises:
        UserError: the model has none, or nothing gives its features weights.
    """
    if not has_weights:
        raise UserError(
            "--freeze trains only the classifier, on features of random weights; give --pretrained, --pretrained-path "
            "or --initial-checkpoint"
        )
    parts = classifiers(model)
    if not any(list(part.parameters()) for part in parts):
        raise UserError(f"--freeze: {name} has no classifier to train; give --num-classes")
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    for tensor in memory_tensors(model):
        model.get_parameter(tensor).requires_grad_(True)


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
