"""Attention of all tokens to all, by torch's own function."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzoo.kernels import scope
from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.tracing import one_node


class _Records(threading.local):
    weights: list[Tensor] | None = None


_of_thread = _Records()


@contextmanager
def record_attention() -> Iterator[list[Tensor]]:
    """Collect the weights of attention [B, G, N, M] that are computed in a `with` block, in this thread, in order.

    They are those of `attend` and of mixers that call `record_weights`; all scores are then held at once. Compiled code
    records nothing.
    """
    before, _of_thread.weights = _of_thread.weights, []
    try:
        yield _of_thread.weights
    finally:
        _of_thread.weights = before


def recording() -> bool:
    """Whether weights of attention are collected now."""
    return not torch.compiler.is_compiling() and _of_thread.weights is not None


def record_weights(weights: Tensor) -> None:
    """Add the weights [B, G, N, M] of an attention to those that `record_attention` collects, where it does."""
    if recording():
        assert _of_thread.weights is not None
        _of_thread.weights.append(weights)


@one_node  # it looks at the device and at widths
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    factor: Tensor | None = None,
    talk: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return `F.scaled_dot_product_attention`, or under `use_backend("reference")` the same from plain products.

    Plain products have second derivatives and forward-mode ones; they hold all scores at once. On a CPU they serve
    where values have a width of their own, too: torch has no fused kernel for that there, and what it does instead
    looks three times through the scores for rows that see nothing. A factor and talking heads have no fused kernel.

    Args:
        q: queries [B, G, N, D].
        k: keys [B, G, M, D].
        v: values [B, G, M, V].
        bias: added to the scaled scores, broadcast to [B, G, N, M]; None for none.
        scale: of the scores; None means D^-½.
        factor: the scaled scores are multiplied by it, before the bias; broadcast to [B, G, N, M].
        talk: two matrices [G, G] that mix the heads before and after the softmax, from rows to columns (talking heads,
            arXiv:2003.02436).

    Returns:
        [B, G, N, V] in q's dtype; scores, softmax and sums are float32 at least.
    """
    unfused = q.device.type == "cpu" and v.shape[-1] != q.shape[-1]
    unfused = unfused or factor is not None or talk is not None or recording()
    if scope.backend != "reference" and not unfused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    dtype, accumulate = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(accumulate) for t in (q, k, v))
    with without_autocast(q.device):
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
        if factor is not None:
            scores = scores * factor.to(accumulate)
        if bias is not None:
            scores = scores + bias.to(accumulate)
        if talk is None:
            attention = scores.softmax(-1)
        else:
            before, after = (mix.to(accumulate) for mix in talk)
            attention = torch.einsum("...hij,hg->...gij", scores, before).softmax(-1)
            attention = torch.einsum("...hij,hg->...gij", attention, after)
        record_weights(attention)
        return (attention @ v).to(dtype)


def uniform_attention(v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what attention of equal weights gives: the mean of the values that a query sees.

    Args:
        v: values [B, G, M, V].
        bias: of the scores, broadcast to [B, G, N, M]; a query sees the keys where it is above -inf. None: all.

    Returns:
        [B, G, 1 or N, V] in v's dtype; sums are float32 at least.
    """
    accumulate = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v.device):
        if bias is None:
            return v.mean(-2, keepdim=True, dtype=accumulate).to(v.dtype)
        seen = (~bias.isneginf()).to(accumulate)
        return (seen / seen.sum(-1, keepdim=True) @ v.to(accumulate)).to(v.dtype)


def hide(keep: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a bias [B, 1, 1, N] by which no query sees the keys for which `keep` [B, N] is False; None for all."""
    if keep is None:
        return None
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, float("-inf"))[:, None, None]


def attention_weights(q: Tensor, k: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Return the softmax of the products of q [B, G, N', D] and k [B, G, N, D], all at once, as `attend` has it.

    Args:
        q: queries.
        k: keys.
        hidden: a bias of the scores, broadcast to [B, G, N', N]; None for none.

    Returns:
        [B, G, N', N], float32 at least.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device):
        scores = (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).mT
        return (scores if hidden is None else scores + hidden.to(dtype)).softmax(-1)


@torch.no_grad()
def attention_received(q: Tensor, k: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Return what keys receive from queries, softmax of their products, as a mean over heads and queries.

    Args:
        q: queries [B, G, N', D]; the first, or those of all keys.
        k: keys [B, G, N, D].
        hidden: see `hide`; or any bias [B, 1 or G, 1, N] of the scores. Hidden keys receive nothing, and where there is
            a query for each key they give nothing.

    Returns:
        [B, N], float32 at least.
    """
    weights = attention_weights(q, k, hidden).mean(1)  # [B, N', N]
    if hidden is None or weights.shape[1] != weights.shape[2]:
        return weights.mean(1)
    seen = (hidden[:, 0] == 0).to(weights.dtype)  # [B, 1, N]
    with without_autocast(q.device):
        return (seen @ weights / seen.sum(-1, keepdim=True)).squeeze(1)
