"""Heads of `visionzoo.layers` put onto any model in place of its own: `timm.create_model("zoo_...", head=...)`.

They read the model's last map, normalized as the model's own head would get it; prefix tokens are left out, and places
of tokens that reducers dropped are zeros before the norm, as `forward_intermediates` has them. Where the model has
several branches (CrossViT) each has a head, and their logits are averaged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from visionzoo.layers.class_queries import ClassQueryHead
from visionzoo.layers.heads import BranchHead
from visionzoo.layers.map_heads import AttentiveHead, EfficientProbeHead, MapHead
from visionzoo.layers.specs import Spec, build_spec, read_spec
from visionzoo.models._contract import Contract

HEADS: Mapping[str, type[MapHead]] = {
    "attentive": AttentiveHead,
    "ep": EfficientProbeHead,
    "intr": ClassQueryHead,
}

_logger = logging.getLogger(__name__)


def with_head(build: Callable[..., Contract], head: Spec | None) -> Callable[..., Contract]:
    """Return what builds a model with another head, which initializes itself, after the model did.

    Args:
        build: builds the model.
        head: None for the model's own; a name or `dict(type=name, **options)` of `HEADS`.
    """
    if head is None:
        return build
    spec = head

    def make(*, global_pool: str | None = None, **kwargs: Any) -> Contract:
        model = build(**kwargs)
        put_head(model, spec, global_pool)
        return model

    return make


def put_head(model: Contract, head: Spec, global_pool: str | None = None) -> None:
    """Replace the head of a model by one of `HEADS`, see `with_head`; `global_pool` is "" for none, or the head's name.

    Raises:
        ValueError: if the name or an option is unknown, the head does not fit the width, or it has another pooling.
    """
    name = read_spec("head", head, HEADS)["type"]
    if getattr(model, "memory", None) is not None:
        raise ValueError(
            f"head: this {type(model).__name__} has a memory, whose token its own head reads; give memory or {head!r}"
        )
    last = model.num_parts - 1
    dims = [info["num_chs"] for info in model.feature_info[last :: model.num_parts]][: model.BRANCHES]

    def make(dim: int, num_classes: int, pool_type: str, drop_rate: float) -> nn.Module:
        try:
            made: nn.Module = build_spec("head", head, HEADS, dim, num_classes, pool_type, drop_rate)
        except ValueError as error:
            raise ValueError(f"head: the last map of {type(model).__name__} has {dim} channels. {error}") from error
        return made

    layer: Callable[..., nn.Module] = make if len(dims) == 1 else partial(BranchHead, dims=dims, head=make)
    model.POOLS, model.default_pool = ("", name), name if global_pool is None else global_pool
    model.HEAD_INPUT, model.head_reads_map = "NCHW", True
    model.head_layer = partial(layer, sum(dims), drop_rate=model.head_layer.keywords["drop_rate"])
    model.head = model._make_head(model.num_classes, model.default_pool)


def head_attention(model: nn.Module, images: Tensor, *, layer: int = -1) -> list[Tensor]:
    """Return what the queries of a model's head see of images, of each branch of the model.

    Args:
        model: a model with `head="intr"`, whose queries are the classes, or `head="ep"`.
        images: [B, C, H, W].
        layer: of INTR's decoder; -1 for the last.

    Returns:
        for each branch [B, G, K, h, w] of G heads and K queries, one head with "ep"; each map adds up to 1.

    Raises:
        ValueError: if the head has no queries, or no such layer.

    >>> import timm, torch, visionzoo
    >>> model = timm.create_model("zoo_convit_t", head="ep", num_classes=3).eval()
    >>> [seen.shape for seen in visionzoo.head_attention(model, torch.zeros(1, 3, 64, 48))]
    [torch.Size([1, 1, 32, 4, 3])]
    """
    own: Any = getattr(model, "head", None)
    heads: list[Any] = list(own) if isinstance(own, BranchHead) else [own]
    if not all(isinstance(head, ClassQueryHead | EfficientProbeHead) for head in heads):
        raise ValueError(
            f"{type(model).__name__} has a {type(heads[0]).__name__} as its head, which has no queries: build it with "
            f"head='intr' or head='ep'"
        )
    features = model.forward_features(images)  # type: ignore[operator]
    found = []
    for head, x in zip(heads, features if isinstance(features, tuple) else (features,), strict=True):
        seen = head.attention(x)  # type: ignore[union-attr, operator]
        if isinstance(head, EfficientProbeHead):
            found.append(seen.unsqueeze(1))
            continue
        if not -len(seen) <= layer < len(seen):
            raise ValueError(f"layer must be from {-len(seen)} to {len(seen) - 1}, got {layer=}")
        found.append(seen[layer])
    return found


def head_tensors(model: Contract) -> list[str]:
    """Return the names of the head's tensors in a model's state_dict where it is not the model's own, else nothing."""
    return [name for name in model.state_dict() if name.startswith("head.")] if model.head_reads_map else []


def drop_other_head(state: dict[str, Tensor], model: Contract) -> list[str]:
    """Take out the tensors of another head than the one put onto a model; return their names.

    The checkpoint is of the same head where it has all tensors of its pooling.
    """
    own = [name for name in head_tensors(model) if not name.endswith(".num_batches_tracked") and ".fc." not in name]
    if not own or all(name in state for name in own):
        return []
    others = [name for name in state if name.startswith("head.")]
    for name in others:
        del state[name]
    return others


def keep_head(state: dict[str, Tensor], model: Contract) -> None:
    """Where a checkpoint has another head, put the model's own tensors into its place, and log how many."""
    dropped = drop_other_head(state, model)
    heads = head_tensors(model)
    if heads and not any(name.startswith("head.") for name in state):
        own = model.state_dict()
        state.update({name: own[name] for name in heads})
        _logger.warning(
            "the pretrained weights are of %s with another head: %d of its tensors are left out, and the %d of the new "
            "one keep their initial values",
            type(model).__name__,
            len(dropped),
            len(heads),
        )
