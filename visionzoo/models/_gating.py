"""Gates put into the blocks of any model, at the end of each block's last residual branch, before the sum.

There squeeze-and-excitation, ECA, CBAM and triplet attention stand in their papers' residual networks; in the zoo's
`Block` it is the MLP's branch. Blocks offer the place as a child `branch_gate`, an `nn.Identity` without gates, and say
its width in an attribute `dim`. Blocks that are part of downsampling (LeViT, SHViT) get none. Gates see maps,
and prefix tokens pass by: where the head reads only the class token, a gate of the last block changes features, not
logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

from torch import Tensor, nn

from visionzoo.layers.gates import build_gate
from visionzoo.layers.specs import by_part, in_turn
from visionzoo.models._contract import Contract

PLACE = "branch_gate"
PUT_IN = {"gates": PLACE, "reducers": "reducer", "predictors": "predictor"}  # what others' models do not have -> where

_logger = logging.getLogger(__name__)


def with_gates(model_cls: Callable[..., Contract], gates: Any) -> Callable[..., Contract]:
    """Return what builds `model_cls` with gates; they initialize themselves, after the model did.

    Args:
        model_cls: the model's class.
        gates: None for none; a name or `dict(type=name, **options)` of `visionzoo.layers.gates.GATES` for all blocks;
            or a sequence with an entry for each part of the model (stages, or blocks of an isotropic one), each None, a
            spec, or a sequence of specs and Nones that the part's blocks take in turn.
    """

    def build(**kwargs: Any) -> Contract:
        model = model_cls(**kwargs)
        add_gates(model, gates)
        return model

    return model_cls if gates is None else build


def add_gates(model: Contract, gates: Any) -> None:
    """Put gates into a model's blocks, see `with_gates`.

    Raises:
        ValueError: if the number of entries is not that of the parts, a name or option is unknown, a gate does not fit
            the width, or a part has no block with a place for one.
    """
    entries = by_part("gates", gates, len(model.parts), model.PARTS)
    for i, (part, entry) in enumerate(zip(model.parts, entries, strict=True)):
        specs = in_turn("gates", entry)
        blocks: Any = [block for block in getattr(part, "blocks", [part]) if hasattr(block, PLACE)]
        if not blocks and any(spec is not None for spec in specs):
            raise ValueError(
                f"gates: {model.PARTS}.{i} of {type(model).__name__} has no block with a place for a gate; give None "
                f"there, got {entry!r}"
            )
        for block, spec in zip(blocks, cycle(specs), strict=False):
            if spec is None:
                continue
            try:
                setattr(block, PLACE, build_gate(spec, block.dim))
            except ValueError as error:
                raise ValueError(
                    f"gates: {model.PARTS}.{i} of {type(model).__name__} has {block.dim} channels. {error}"
                ) from error


def gate_tensors(model: nn.Module, place: str = PLACE) -> list[str]:
    """Return the names of the tensors of gates, or of what else stands in a place, in a model's state_dict."""
    return [name for name in model.state_dict() if f".{place}." in f".{name}"]


def new_tensors(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, list[str]]:
    """Return the tensors of what was put into a model and is not in a checkpoint at all, by its kind."""
    kinds = {kind: gate_tensors(model, place) for kind, place in PUT_IN.items()}
    return {kind: names for kind, names in kinds.items() if names and not any(name in state for name in names)}


def keep_gates(state: dict[str, Tensor], model: nn.Module) -> None:
    """Where a checkpoint has no gates, put the model's own into it, and log how many; so with reducers."""
    for kind, names in new_tensors(state, model).items():
        own = model.state_dict()
        state.update({name: own[name] for name in names})
        _logger.warning(
            "the pretrained weights are of %s without %s: the %d tensors of its %s keep their initial values",
            type(model).__name__,
            kind,
            len(names),
            kind,
        )
