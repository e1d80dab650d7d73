"""What turns the scores of attention into weights: softmax and what has been put in its place.

Each takes scores [..., N] of N keys, float32 at least, and gives weights of that shape. Those that have weights of
their own, for each head, are modules and take [B, G, R, N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo._torch_private import forward_mode_level
from visionzoo.kernels.score_attention.reference import relu, sigmoid, signed_softmax, softplus, taylor
from visionzoo.layers.norm import standardize

NEWTON_STEPS = 12  # of rows of 64 to 65,536 scores of several distributions none needed more than 9 in float64


class _Entmax(torch.autograd.Function):
    """Forward by Newton's method; the derivatives are closed forms of the weights, so that they have derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, alpha: Tensor | float) -> Tensor:
        power = 1 / (alpha - 1)
        x = scores * (alpha - 1)
        x = x - x.amax(-1, keepdim=True)
        # The norm ‖(x - τ)₊‖ of this power falls and is convex in τ; from below, where it is at least 1, Newton's
        # steps never pass the τ at which it is 1. Both start values are below: only the largest score, and the mean.
        tau = (x.mean(-1, keepdim=True) - x.new_full((), x.shape[-1]) ** (1 - alpha)).clamp(min=-1)
        for _ in range(NEWTON_STEPS):
            above = (x - tau).clamp(min=0)
            slope = torch.where(above > 0, above ** (power - 1), 0)
            total = (above * slope).sum(-1, keepdim=True)
            tau = tau + (total - total ** (2 - alpha)) / slope.sum(-1, keepdim=True)
        weights = (x - tau).clamp(min=0) ** power
        return weights / weights.sum(-1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | float], output: Tensor) -> None:
        ctx.alpha = inputs[1] if isinstance(inputs[1], float) else None  # powers with a number are quicker
        saved = (output, *(() if ctx.alpha else inputs[1:]))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        weights, *rest = ctx.saved_tensors
        alpha = ctx.alpha or rest[0]
        by_scores = _along_scores(weights, alpha, grad)
        if not ctx.needs_input_grad[1]:
            return by_scores, None
        return by_scores, (grad * _slope_of_alpha(weights, alpha)).sum_to_size(alpha.shape)


class _EntmaxWithTangents(_Entmax):
    """For forward mode; apart, as torch.compile refuses functions that say what it is."""

    @staticmethod
    def jvp(ctx: Any, of_scores: Tensor, of_alpha: Tensor | None) -> Tensor:  # type: ignore[override]
        weights, *rest = ctx.saved_tensors
        alpha = ctx.alpha or rest[0]
        tangent = _along_scores(weights, alpha, of_scores)
        return tangent if of_alpha is None else tangent + _slope_of_alpha(weights, alpha) * of_alpha


def _shares_of_change(weights: Tensor, alpha: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return how a weight moves with its own score, and how much of all weights' change it bears."""
    held = weights > 0
    slope = torch.where(held, torch.where(held, weights, 1) ** (2 - alpha), 0)
    return slope, slope / slope.sum(-1, keepdim=True)


def _along_scores(weights: Tensor, alpha: Tensor | float, direction: Tensor) -> Tensor:
    """Return the Jacobian for the scores, which is symmetric, times a direction."""
    slope, share = _shares_of_change(weights, alpha)
    along = slope * direction
    return along - share * along.sum(-1, keepdim=True)


def _slope_of_alpha(weights: Tensor, alpha: Tensor) -> Tensor:
    """Return the derivative for α."""
    _, share = _shares_of_change(weights, alpha)
    power = 1 / (alpha - 1)
    entropy = -weights * torch.where(weights > 0, weights, 1).log()
    return power**2 * (weights - share) + power * (entropy - share * entropy.sum(-1, keepdim=True))


def entmax(scores: Tensor, alpha: Tensor | float) -> Tensor:
    """α-entmax: weights ((α - 1)·s - τ)₊^(1 / (α - 1)) with the τ that makes their sum 1.

    2 is sparsemax, 1.5 entmax-1.5, and towards 1 it becomes softmax. Exact to the last digits, in values, in
    derivatives for the scores and α, forward and reverse, and in second derivatives (Peters et al., arXiv:1905.05702,
    for the values; Correia et al., arXiv:1909.00015, for α).

    Args:
        scores: [..., N], floating point.
        alpha: above 1 and up to 2: a float, or a tensor of the scores' dtype that is broadcast to [..., 1].

    Returns:
        [..., N]

    >>> entmax(torch.tensor([0.0, 0.5, 2.0]), 2.0)
    tensor([0., 0., 1.])
    """
    forward_mode = not torch.compiler.is_compiling() and forward_mode_level() >= 0
    function = _EntmaxWithTangents if forward_mode else _Entmax
    return function.apply(scores, alpha)  # type: ignore[no-any-return, no-untyped-call]


def softmax(scores: Tensor) -> Tensor:
    """exp(s), divided by the sum."""
    return scores.softmax(-1)


def sparsemax(scores: Tensor) -> Tensor:
    """Nearest point of the simplex, (s - τ)₊ (Martins and Astudillo, arXiv:1602.02068)."""
    return entmax(scores, 2.0)


def entmax15(scores: Tensor) -> Tensor:
    """(s/2 - τ)₊² (Peters et al., arXiv:1905.05702)."""
    return entmax(scores, 1.5)


class LearnedEntmax(nn.Module):
    """α-entmax with an α from 1.01 to 2 that each head learns, 1.5 at the start (arXiv:1909.00015)."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.sharpness = nn.Parameter(torch.zeros(num_heads))  # α = 1 + sigmoid

    def forward(self, scores: Tensor) -> Tensor:
        """Scores [B, G, R, N] to weights."""
        alpha = 1 + self.sharpness.to(scores.dtype).sigmoid().clamp(min=0.01)
        return entmax(scores, alpha[:, None, None])


class Standardize(nn.Module):
    """Scores of a query, brought to mean 0 and deviation 1, times a gain plus a bias per head (arXiv:2005.09561)."""

    EPS = 1e-3  # added to the deviation

    def __init__(self, num_heads: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_heads))
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def forward(self, scores: Tensor) -> Tensor:
        """Scores [B, G, R, N] to weights."""
        gain, bias = (p.to(scores.dtype)[:, None, None] for p in (self.gain, self.bias))
        return standardize(scores, self.EPS) * gain + bias


class TopkSoftmax(nn.Module):
    """Softmaxes of only the largest scores, for four shares of the keys, in a learned sum (TKSA, arXiv:2303.11950).

    Of N scores the largest ⌊N/2⌋, ⌊2N/3⌋, ⌊3N/4⌋ and ⌊4N/5⌋ are kept, one at least; all heads share the sum's factors.
    """

    SHARES = ((1, 2), (2, 3), (3, 4), (4, 5))

    def __init__(self, num_heads: int):
        super().__init__()
        self.factors = nn.Parameter(torch.full((len(self.SHARES),), 0.2))

    def forward(self, scores: Tensor) -> Tensor:
        """Scores [B, G, R, N] to weights."""
        counts = [max(1, scores.shape[-1] * part // whole) for part, whole in self.SHARES]
        largest, index = scores.topk(counts[-1], -1)
        weights = sum(
            F.pad(largest[..., :count].softmax(-1) * factor, (0, counts[-1] - count))
            for count, factor in zip(counts, self.factors.to(scores.dtype), strict=True)
        )
        return torch.zeros_like(scores).scatter(-1, index, weights)


NORMALIZERS: dict[str, Callable[[Tensor], Tensor] | type[nn.Module]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "entmax": LearnedEntmax,
    "relu": relu,
    "signed_softmax": signed_softmax,
    "softplus": softplus,
    "standardize": Standardize,
    "taylor": taylor,
    "topk_softmax": TopkSoftmax,
}
# those for which it does not matter what is added to all scores of a query
SHIFT_INVARIANT = ("softmax", "sparsemax", "entmax15", "entmax", "topk_softmax")


def build_normalizer(name: str, num_heads: int) -> Callable[[Tensor], Tensor]:
    """Return the normalizer of a name in `NORMALIZERS`, a function or a module, for scores of that many heads."""
    entry = NORMALIZERS[name]
    return entry(num_heads) if isinstance(entry, type) else entry
