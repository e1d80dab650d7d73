"""Learnable memory (Sandler et al., CVPR 2022, arXiv:2203.15243) in any isotropic model: a further task beside its own.

A new class token, the reader, attends to itself, to the model's tokens and to memory tokens that each block has for it;
the model's tokens see neither. So they, and the logits of the model's own head, stay what they were, bit for bit, and
one pass gives both tasks' logits (`Isotropic.forward_tasks`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionzoo.layers.heads import TokenHead
from visionzoo.layers.memory import Memory
from visionzoo.layers.mixers.base import Mixer
from visionzoo.models._contract import Contract
from visionzoo.models._isotropic import Isotropic

_logger = logging.getLogger(__name__)


def add_memory(model: Contract, tokens: int = 5, *, num_classes: int | None = None, keep_head: bool = True) -> None:
    """Put a memory into an isotropic model, whose logits are from then on those of the further task.

    Blocks whose mixer has no place for tokens beside the map leave the reader as it is, and get no memory tokens. The
    reader has no position.

    Args:
        model: its weights are loaded, if any are to be.
        tokens: memory tokens M of a block.
        num_classes: of the further task; None for as many as the model has.
        keep_head: keep the model's head, and with it its task: all of the model is frozen, and stays in evaluation
            mode in training. Without, it learns with the memory, and its norm is the reader's.

    Raises:
        ValueError: if the model is not isotropic, has a memory, or has blocks that a reader cannot go through, no mixer
            has a place for it, or there are no tokens.

    >>> import timm, torch, visionzoo
    >>> model = timm.create_model("zoo_convit_t", depth=3, local_depth=2, embed_dim=16)
    >>> add_memory(model, 4, num_classes=10)
    >>> [tuple(logits.shape) for logits in model.forward_tasks(torch.randn(2, 3, 32, 32))]
    [(2, 10), (2, 1000)]
    """
    name = type(model).__name__
    if not isinstance(model, Isotropic):
        raise ValueError(f"memory: expected an isotropic model, such as zoo_convit_t, got {name}, which has no tokens")
    if model.memory is not None:
        raise ValueError(f"memory: this {name} has one already; build the model anew")
    if tokens < 1:
        raise ValueError(f"memory: expected 1 token or more in each block, got {tokens=}")
    blocks: Any = model.blocks
    if wrong := sorted({_kind(block) for block in blocks if not _takes_reader(block)}):
        raise ValueError(f"memory: {name} has blocks that take no further token through: {', '.join(wrong)}")
    if any(block.reducer is not None for block in blocks):
        raise ValueError(f"memory: this {name} drops tokens by reducers, beside which no memory is; leave one out")
    places = [block for block in blocks if _has_place(block.mixer)]
    if not places:
        raise ValueError(
            f"memory: nothing would read the image, for none of the mixers of this {name} has a place for tokens "
            f"beside the map; keep one that has, such as 'full'"
        )
    if len(places) < len(blocks):
        _logger.warning("%s: %d of %d blocks have no place for memory", name, len(blocks) - len(places), len(blocks))
    like = next(model.parameters())
    if keep_head:
        model.requires_grad_(False)
    for block in places:
        block.memory = nn.Parameter(trunc_normal_(like.new_empty(tokens, model.num_features), std=0.02))
    norm = copy.deepcopy(model.norm).requires_grad_(True) if keep_head else None
    model.memory = Memory(model.num_features, norm=norm, head=model.head if keep_head else None).to(like)
    model.num_prefix_tokens += 1
    model.POOLS = TokenHead.POOLS
    drop_rate = model.head_layer.keywords["drop_rate"]
    model.head_layer = partial(  # type: ignore[assignment]
        TokenHead, model.num_features, drop_rate=drop_rate, prefix_tokens=model.num_prefix_tokens
    )
    model.default_pool = "token"
    model.num_classes = model.num_classes if num_classes is None else num_classes
    model.head = model._make_head(model.num_classes, "token").to(like)
    model.train(model.training)


def _kind(block: Any) -> str:
    return f"{type(block).__name__} with {type(getattr(block, 'mixer', None)).__name__}"


def _takes_reader(block: Any) -> bool:
    """Whether a block takes one more token through, and its mixer does not have a fixed number of prefix tokens."""
    fixed = hasattr(getattr(block, "mixer", None), "prefix_tokens") or hasattr(
        getattr(block, "mlp", None), "mixes_tokens"
    )
    return getattr(block, "takes_memory", False) and not fixed


def _has_place(mixer: Any) -> bool:
    return isinstance(mixer, Mixer) and mixer.takes_prefix_tokens and not mixer.needs_places


def with_memory(build: Callable[..., Contract], memory: Any) -> Callable[..., Contract]:
    """Return what builds a model with memory.

    Args:
        build: builds the model.
        memory: None for none; the number of tokens of a block; or a mapping with `tokens` and `host_classes`, the
            classes of the model's own task, as many as its weights have (1000 where it is left out).

    Raises:
        ValueError: if it is neither.
    """
    if memory is None:
        return build
    spec = dict(memory) if isinstance(memory, Mapping) else {"tokens": memory}
    if set(spec) - {"tokens", "host_classes"} or not all(type(value) is int for value in spec.values()):
        raise ValueError(
            f"memory: expected a number of tokens, or a mapping with tokens and host_classes, numbers both, got "
            f"{memory!r}"
        )
    host = {"num_classes": spec.pop("host_classes")} if "host_classes" in spec else {}

    def built(*, num_classes: int | None = None, **kwargs: Any) -> Contract:
        model = build(**kwargs, **host)
        add_memory(model, **spec, num_classes=num_classes)
        return model

    return built


def memory_tensors(model: nn.Module) -> list[str]:
    """Return the names of the tensors that a model would not have without its memory, and its head's beside its own."""
    memory: Memory | None = getattr(model, "memory", None)
    if memory is None:
        return []
    new = ("memory.",) if memory.head is None else ("memory.", "head.")
    names = [name for name in model.state_dict() if not name.startswith("memory.head.")]
    return [name for name in names if name.startswith(new) or name.endswith(".memory")]


def as_host(state: dict[str, Tensor], model: nn.Module) -> None:
    """Where a model has a memory beside its own head and the checkpoint none, take its head for the model's own."""
    memory: Memory | None = getattr(model, "memory", None)
    if memory is not None and memory.head is not None and not any(name.startswith("memory.") for name in state):
        for name in [name for name in state if name.startswith("head.")]:
            state[f"memory.{name}"] = state.pop(name)


def keep_memory(state: dict[str, Tensor], model: nn.Module) -> None:
    """Where a checkpoint has no memory, put the model's own into it, and log how many tensors that are."""
    names = memory_tensors(model)
    if names and not any(name in state for name in names):
        own = model.state_dict()
        state.update({name: own[name] for name in names})
        _logger.warning(
            "the pretrained weights are of %s without memory: its %d tensors and those of its head keep their initial "
            "values",
            type(model).__name__,
            len(names),
        )
