"""Outputs beside logits: early exits, and named terms of the loss that modules deep inside a model add.

A model that is asked for them (`Contract.set_auxiliary`) and is in training mode collects them during its forward pass
and returns `Outputs`; in every other case it returns a tensor, and adding a term does nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visionzoo.kernels.scope import keep_backend

if TYPE_CHECKING:
    collections: list[dict[str, Tensor]]


class Exit(NamedTuple):
    """What a classifier inside a model says; its weight is in the model's `auxiliary_weights()`, by its name."""

    name: str
    logits: Tensor  # [B, num_classes]; of a segmentor [B, num_classes, H, W]
    target: Tensor | None = None  # probabilities [B, num_classes] to learn; None for the labels


class Outputs(NamedTuple):
    """What a model in training returns where it is asked for more than logits."""

    logits: Any  # [B, num_classes]; what `forward_head` returns
    exits: tuple[Exit, ...] = ()
    terms: Mapping[str, Tensor] = {}  # scalars, not weighted


class WithOutputs(nn.Module):
    """A model that can return `Outputs` in training."""

    auxiliary = False  # whether a forward pass in training returns `Outputs`

    def auxiliary_weights(self) -> dict[str, float]:
        """Return the default weights in the loss of the model's exits and terms, by name, as `AUXILIARY` declares them.

        Raises:
            ValueError: if two modules declare different weights for one name.
        """
        weights: dict[str, float] = {}
        for path, module in self.named_modules():
            for name, weight in getattr(module, "AUXILIARY", {}).items():
                if weights.setdefault(name, weight) != weight:
                    raise ValueError(
                        f"{type(self).__name__}: {name!r} has the weight {weights[name]} and in {path} {weight}; "
                        "give both the same weight, or different names"
                    )
        return weights

    def set_auxiliary(self, enable: bool = True) -> None:
        """Let training mode return `visionzoo.layers.outputs.Outputs`: logits, exits and named terms of the loss.

        Raises:
            ValueError: if the model has neither exits nor terms.
        """
        if enable and not self.auxiliary_weights():
            raise ValueError(f"{type(self).__name__} as built has no exits and no terms: it returns only logits")
        self.auxiliary = enable


class _Collections(threading.local):
    """Terms of the models in their forward pass in this thread, the innermost model's last."""

    def __init__(self) -> None:
        self.open: list[dict[str, Tensor]] = []


_of_thread = _Collections()
_this = sys.modules[__name__]


def __getattr__(name: str) -> list[dict[str, Tensor]]:
    # torch.compile looks up computed attributes of modules anew at every call, and keeps those of a threading.local
    if name == "collections":
        return _of_thread.open
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def collecting() -> bool:
    """Whether a model collects terms now, so that one that is costly to compute can be left out where none does."""
    return len(_this.collections) > 0  # torch.compile before 2.14 takes no bool of a list


def add_term(name: str, value: Tensor) -> None:
    """Add a term to the loss of the model whose forward pass this is; without effect where no model collects terms.

    A module calls it in its `forward` where `self.training` holds, and declares the term's default weight:
    `AUXILIARY = {name: weight}`. Values of one name, of several blocks for example, add up.

    Args:
        name: of the term, as in the log.
        value: scalar, not weighted; a mean over the images of the batch. It is kept in float32 at least.

    Raises:
        ValueError: if the value is not a scalar.

    >>> with collect() as terms:
    ...     add_term("balance", torch.tensor(0.5))
    ...     add_term("balance", torch.tensor(0.25))
    >>> terms
    {'balance': tensor(0.7500)}
    """
    if not collecting():
        return
    if value.dim() != 0:
        raise ValueError(f"add_term: expected a scalar for {name!r}, got shape {tuple(value.shape)}; take its mean")
    terms = _this.collections[-1]
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    terms[name] = terms[name] + value if name in terms else value


@contextmanager
def collect() -> Iterator[dict[str, Tensor]]:
    """Collect the terms that are added in a `with` block, in this thread; blocks nest, and the innermost collects."""
    terms: dict[str, Tensor] = {}
    opened = _this.collections
    opened.append(terms)
    try:
        yield terms
    finally:
        opened.pop()


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function now and again in the backward pass, under the backend asked for now; its terms count once.

    In compiled code, terms need `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True`, as torch
    says where it is missing; `visionzoo train` sets it.
    """
    function = keep_backend(function)
    if torch.compiler.is_compiling() or not collecting():
        return checkpoint(function, *args, use_reentrant=False)

    def run(*args: Any) -> tuple[Any, dict[str, Tensor]]:
        with collect() as terms:  # both times, for both must compute the same
            return function(*args), terms

    out, terms = checkpoint(run, *args, use_reentrant=False)
    for name, value in terms.items():
        add_term(name, value)
    return out
