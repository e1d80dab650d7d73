"""Reducers put between the blocks of any isotropic model: `reduce=` of `timm.create_model`.

A reducer stands before a block as its child `reducer`. All blocks from there on must do without the whole map: their
mixers have to take dropped tokens (`Mixer.takes_dropped_tokens`), and they have no convolutions or position
generators. Gates see the map with zeros in dropped places.

`features_only` and `forward_intermediates` put the tokens back to their places on the map. Dropped places are zeros,
before the norm where one is asked for; so it is in `forward_features`, but where the head pools the map: there they
hold the mean of the image's other tokens, which changes neither mean nor maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.reducers import REDUCERS, Reducer, build_reducer
from visionzoo.layers.specs import by_part, read_spec
from visionzoo.layers.tokens import TokenBlock, Tokens, put_back
from visionzoo.models._contract import Contract
from visionzoo.models._isotropic import Isotropic


def with_reducers(model_cls: Callable[..., Contract], reduce: Any) -> Callable[..., Contract]:
    """Return what builds `model_cls` with reducers.

    Args:
        model_cls: the model's class, or what builds it.
        reduce: None for none; a name or `dict(type=name, **options)` of `visionzoo.layers.reducers.REDUCERS`, for the
            places that the reducer's paper has them in (`Reducer.places`); or a sequence with an entry for each block,
            None or the spec of what stands before it.
    """

    def build(**kwargs: Any) -> Contract:
        model = model_cls(**kwargs)
        add_reducers(model, reduce)
        return model

    return model_cls if reduce is None else build


def add_reducers(model: Contract, reduce: Any) -> None:
    """Put reducers before a model's blocks, see `with_reducers`.

    Raises:
        ValueError: if the model has no tokens to drop, the number of entries is not that of the blocks, a name or
            option is unknown, or a block from the first reducer on needs the whole map.
    """
    name = type(model).__name__
    if not isinstance(model, Isotropic):
        raise ValueError(
            f"reduce: {name} is not an isotropic model, its {model.PARTS} need whole maps; leave reduce out, or take a "
            f"model of tokens, such as zoo_deit_s, got reduce={reduce!r}"
        )
    blocks: Any = model.blocks
    if isinstance(reduce, str | Mapping):
        kind = REDUCERS[read_spec("reducer", reduce, REDUCERS)["type"]]
        entries: Sequence[Any] = [reduce if i in kind.places(len(blocks)) else None for i in range(len(blocks))]
    else:
        entries = by_part("reduce", reduce, len(blocks), model.PARTS)
    first = next((i for i, entry in enumerate(entries) if entry is not None), None)
    if first is None:
        return
    if any(getattr(block, "memory", None) is not None for block in blocks[first:]):
        raise ValueError(f"reduce: this {name} has a memory, which sees all tokens; leave memory or reduce out")
    for i in range(first, len(blocks)):
        if reason := _needs_map(blocks[i]):
            raise ValueError(
                f"reduce: {model.PARTS}.{first} of {name} would get fewer tokens, but {model.PARTS}.{i} {reason}; put "
                f"reducers behind it, one entry for each of the {len(blocks)} {model.PARTS}, or give it another mixer, "
                f"such as mixers='full'"
            )
    drops = ""  # the kind of a reducer before, that hides tokens in training
    for i, entry in enumerate(entries):
        if entry is None:
            continue
        reducer = build_reducer(entry, blocks[i].dim)
        if reducer.MAKES_TOKENS and (drops or _has_gate(blocks[i:]) or _needs_places(blocks[i:])):
            raise ValueError(
                f"reduce: {model.PARTS}.{i} of {name}: {type(reducer).__name__} makes new tokens, of which none is "
                f"that of one place: put it before {drops or 'gates and mixers that ask for places'}, or leave one out"
            )
        drops = drops or ("" if reducer.MAKES_TOKENS else type(reducer).__name__)
        _put(model, i, reducer)
    model.POOLS = tuple(pool for pool in model.POOLS if pool != "map")
    model._check_pool(model.default_pool)


@torch.no_grad()
def kept_places(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return which places of the map still have a token after each reducer: [B, H, W], by the block that it is before.

    Args:
        model: a model, in evaluation mode.
        image: [B, in_chans, H, W].
    """
    found: dict[str, Tensor] = {}

    def look(name: str, tokens: Tokens) -> None:
        there = tokens.x.new_ones(*tokens.x.shape[:2], 1)[:, tokens.prefix :]
        found[name] = put_back(there, tokens.source, tokens.keep)[..., 0].unflatten(1, tokens.size) > 0

    hooks = [
        block.register_forward_hook(lambda _block, _args, tokens, name=name: look(name, tokens))
        for name, block in model.named_modules()
        if isinstance(block, TokenBlock) and block.reducer is not None
    ]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _put(model: Isotropic, i: int, reducer: Reducer) -> None:
    name, kind, blocks = type(model).__name__, type(reducer).__name__, model.blocks
    where = f"reduce: {model.PARTS}.{i} of {name}"
    seen = i - bool(reducer.SCORES)  # the block whose tokens it looks at
    if reducer.NEEDS_CLASS_TOKEN and not (_has_class_token(model) and seen >= model.prefix_at):
        raise ValueError(
            f"{where}: {kind} looks at a class token, which is not there; build the model with class_token=True, put "
            f"it behind block {model.prefix_at}, or take 'representation_shift'"
        )
    if reducer.SCORES:
        before: Any = blocks[i - 1] if i else None
        if not isinstance(before, TokenBlock):
            raise ValueError(
                f"{where}: {kind} asks the block before for {reducer.SCORES!r}, and there is none; put it before a "
                f"later block"
            )
        if reducer.SCORES in Mixer.SCORE_KINDS and reducer.SCORES not in getattr(before.mixer, "SCORES", ()):
            raise ValueError(
                f"{where}: {kind} asks for {reducer.SCORES!r}, which {type(before.mixer).__name__} of block {i - 1} "
                f"does not have; give that block mixers='full', or take 'representation_shift'"
            )
        before.score = reducer.SCORES
    blocks[i].reducer = reducer


def _has_gate(blocks: Iterable[Any]) -> bool:
    return any(not isinstance(block.branch_gate, nn.Identity) for block in blocks)


def _needs_places(blocks: Iterable[Any]) -> bool:
    return any(getattr(block.mixer, "needs_places", False) for block in blocks)


def _has_class_token(model: Isotropic) -> bool:
    return bool(model.num_prefix_tokens) and "cls_token" in model.prefix.names


def _needs_map(block: Any) -> str:
    """Say what in a block needs the whole map; "" for nothing."""
    if not isinstance(block, TokenBlock) or type(block).forward is not TokenBlock.forward:
        return f"({type(block).__name__}) carries more than tokens"
    for part in ("cpe1", "cpe2"):
        if getattr(block, part) is not None:
            return "has a convolution of the map"
    if not isinstance(block.peg, nn.Identity):
        return "has a position generator, a convolution of the map"
    if not (block.mixer is None or (isinstance(block.mixer, Mixer) and block.mixer.takes_dropped_tokens)):
        sees = isinstance(block.mixer, Mixer) and block.mixer.takes_prefix_tokens and not block.mixer.needs_map_size
        lack = "has no place for dropped tokens" if sees else "needs the whole map"
        return f"mixes by {type(block.mixer).__name__}, which {lack}"
    return ""
