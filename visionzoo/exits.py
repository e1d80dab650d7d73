"""Models that answer from the first of their classifiers that is sure enough, and what each answer costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visionzoo.models._checkpoint import unwrap
from visionzoo.models._contract import Contract
from visionzoo.text import did_you_mean

END = "end"  # the model's own answer, after all parts


class Answers(NamedTuple):
    """What a batch is answered, and by which classifier."""

    logits: Tensor  # [B, num_classes]
    exits: Tensor  # [B], numbers in `EarlyExitModel.names`


class EarlyExitModel(nn.Module):
    """A model whose samples stop at the first exit that is sure enough; a stopped one costs nothing further.

    After each part with exits the batch is cut to the samples that continue, and a batch of which none does ends there.
    A sample gets the answer that it gets by itself. How sure an exit is, is its largest probability (softmax, in
    float32 at least).

    Args:
        model: a model of the zoo with exits; it is put into eval mode, and stays so.
        thresholds: exit -> probability from 0 to 1 at which it answers; at 0 it answers for all. An exit that is not
            named is not asked.

    Raises:
        ValueError: if the model has no exits, or none of a name, or a threshold is out of range.

    >>> import timm, visionzoo
    >>> model = timm.create_model("zoo_dynperceiver_mobilenetv3_050", num_classes=10)
    >>> early = visionzoo.EarlyExitModel(model, {"early": 0.8, "latent": 0.6})
    >>> logits, exits = early.answer(torch.randn(4, 3, 64, 64))
    >>> logits.shape, early.names
    (torch.Size([4, 10]), ('early', 'latent', 'cnn', 'end'))
    """

    def __init__(self, model: nn.Module, thresholds: Mapping[str, float]):
        super().__init__()
        self.model = _with_exits(model)
        places = self.model.exit_places()
        for name, threshold in thresholds.items():
            _place(self.model, name)
            number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
            if not number or not isfinite(threshold) or not 0 <= threshold <= 1:
                raise ValueError(
                    f"thresholds: {name!r} must be a probability from 0 to 1 at which the exit answers, got "
                    f"{threshold!r}; leave the exit out where it is not to be asked"
                )
        self.names = (*places, END)
        self.thresholds = {name: float(thresholds[name]) for name in places if name in thresholds}
        self.eval()

    def train(self, mode: bool = True) -> EarlyExitModel:
        """Stay in eval mode.

        Raises:
            RuntimeError: if asked for training mode.
        """
        if mode:
            raise RuntimeError("samples stop early in evaluation only: train the model that this was made from")
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.answer(images).logits

    @torch.no_grad()
    def answer(self, images: Tensor) -> Answers:
        """Images [B, in_chans, H, W] to logits [B, num_classes], and the numbers of the exits that gave them, [B]."""
        model, places = self.model, self.model.exit_places()
        left = torch.arange(len(images), device=images.device)  # samples that have no answer yet
        exits = torch.full_like(left, len(self.names) - 1)
        logits: Tensor | None = None
        state = model.begin(images)
        for part in range(len(model.parts)):
            state = model.advance(part, state)
            for number, (name, place) in enumerate(places.items()):
                if place != part or name not in self.thresholds:
                    continue
                said = model.classify(name, state)
                sure = confidence(said) >= self.thresholds[name]
                stopped, going = sure.nonzero()[:, 0], (~sure).nonzero()[:, 0]
                if not len(stopped):
                    continue
                logits = said.new_empty(len(images), *said.shape[1:]) if logits is None else logits
                logits[left[stopped]] = said[stopped]
                exits[left[stopped]] = number
                state, left = take_samples(state, going, len(left)), left[going]
                if not len(left):
                    return Answers(logits, exits)
        said = model.forward_head(model.finish(state))
        if logits is None:
            return Answers(said, exits)
        logits[left] = said
        return Answers(logits, exits)


class ExitModel(nn.Module):
    """What one exit of a model answers, without the parts after it: a copy, in eval mode, such as to export.

    Args:
        model: a model of the zoo with exits; it is not changed.
        exit: name of the exit.

    Raises:
        ValueError: if the model has no exits, or none of this name.
    """

    def __init__(self, model: nn.Module, exit: str):
        super().__init__()
        whole = _with_exits(model)
        self.exit, self.place = exit, _place(whole, exit)
        later = {id(part): nn.Identity() for part in whole.parts[self.place + 1 :]}  # which the copy does without
        self.model = copy.deepcopy(whole, later)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        state = self.model.begin(images)
        for part in range(self.place + 1):
            state = self.model.advance(part, state)
        return self.model.classify(self.exit, state)


@dataclass(frozen=True)
class ExitCosts:
    """Multiply-adds of one image, as torch's `FlopCounterMode` counts them."""

    parts: tuple[float, ...]  # until the end of each part, without classifiers
    exits: Mapping[str, float]  # of each exit's classifier
    places: Mapping[str, int]  # the part after which each exit may answer
    end: float  # of what follows the last part

    def until(self, name: str, asked: Mapping[str, Any] | None = None) -> float:
        """Return the multiply-adds of an image that exit `name` answers, or `END`.

        Args:
            name: of the exit.
            asked: the exits that are asked; those before the last count. None for all.
        """
        names = list(self.exits)
        before = names if name == END else names[: names.index(name)]
        classifiers = sum(self.exits[each] for each in before if asked is None or each in asked)
        if name == END:
            return self.parts[-1] + classifiers + self.end
        return self.parts[self.places[name]] + classifiers + self.exits[name]


@torch.no_grad()
def exit_costs(model: nn.Module, input_size: tuple[int, int, int]) -> ExitCosts:
    """Count what each exit of a model costs on an image of (channels, height, width); the model runs once.

    Raises:
        ValueError: if the model has no exits.
    """
    model = _with_exits(model)
    places, training = model.exit_places(), model.training
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    parts: list[float] = []
    exits: dict[str, float] = {}
    spent = 0.0
    model.eval()
    try:
        with FlopCounterMode(display=False) as counter:

            def since() -> float:
                nonlocal spent
                before, spent = spent, counter.get_total_flops() / 2
                return spent - before

            state = model.begin(image)
            for part in range(len(model.parts)):
                state = model.advance(part, state)
                parts.append((parts[-1] if parts else 0.0) + since())
                for name in [name for name, place in places.items() if place == part]:
                    model.classify(name, state)
                    exits[name] = since()
            model.forward_head(model.finish(state))
            end = since()
    finally:
        model.train(training)
    return ExitCosts(tuple(parts), exits, places, end)


def confidence(logits: Tensor) -> Tensor:
    """Return the largest probability of each row of logits [B, K]: [B], in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).amax(-1)


def take_samples(state: Any, index: Tensor, batch: int) -> Any:
    """Return the state of a model with only some samples of its batch.

    Args:
        state: tensors whose first axis is the batch, in tuples and named tuples; other values stay.
        index: numbers of the samples.
        batch: samples before.

    Raises:
        ValueError: if a tensor has another first axis.
    """
    if isinstance(state, Tensor):
        if not state.ndim or len(state) != batch:
            raise ValueError(f"take_samples: expected tensors of {batch} samples, got {tuple(state.shape)}")
        kept = state[index]
        if state.ndim == 4 and state.is_contiguous(memory_format=torch.channels_last):
            return kept.contiguous(memory_format=torch.channels_last)
        return kept
    if isinstance(state, tuple):
        values = [take_samples(value, index, batch) for value in state]
        return type(state)(*values) if hasattr(state, "_fields") else tuple(values)
    return state


def _with_exits(model: nn.Module) -> Contract:
    bare = unwrap(model)
    if not bare.exit_places():
        raise ValueError(
            f"{type(bare).__name__} as built has no exits: models such as zoo_dynperceiver_* have, with num_classes "
            f"and all their parts"
        )
    return bare


def _place(model: Contract, name: str) -> int:
    places = model.exit_places()
    if name not in places:
        raise ValueError(
            f"{type(model).__name__} has no exit {name!r}{did_you_mean(name, places)}; it has {', '.join(places)}"
        )
    return places[name]
