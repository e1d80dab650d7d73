"""Confidence-guided annealing: weights that no rounding is close to are frozen, step by step (arXiv:2302.02210).

A weight that oscillates between two levels stays near the boundary between them. At the end of a training only such
weights learn: before each update it is decided anew, by the weights as they are, so that nothing is kept from step to
step. Facts from https://github.com/nbasyl/OFQ at 7ed37d1 (MIT), cga.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.quantization.attention import QueryKeyProjection
from visionzoo.quantization.quantizers import StatsQ


@torch.no_grad()
def far_from_rounding(weight: Tensor, quantizer: StatsQ, margin: float) -> Tensor:
    """Return which weights [rows, ...] are frozen: farther than `margin` from where they would round to another level.

    Boundaries are those between levels that some weight of the tensor has.

    Args:
        weight: before it is quantized.
        quantizer: of the weight.
        margin: in steps between levels, from 0 to 0.5.
    """
    steps = quantizer.before_rounding(weight)
    rounded = steps.round()
    below = (steps - 0.5).round()  # the level below the nearest boundary
    between = (below >= rounded.min()) & (below < rounded.max())
    return ~(between & ((steps - below - 0.5).abs() <= margin))


class Annealing:
    """Freezes the weights of a model's layers that learn and that StatsQ quantizes, where no boundary is near.

    `hold` comes before an update of the optimizer, when gradients are whole, and `restore` after it. The product of the
    weights of queries and keys is not held, as the authors' code has no effect on it.

    Args:
        model: a quantized one.
        margin: see `far_from_rounding`.

    Raises:
        ValueError: the margin is out of its range, or no weight that learns is StatsQ's.
    """

    def __init__(self, model: nn.Module, margin: float):
        if not 0 < margin <= 0.5:
            raise ValueError(f"expected a margin above 0 and at most 0.5, got {margin}")
        self.margin = margin
        self.held: list[tuple[nn.Parameter, slice, StatsQ]] = []  # tensors, their rows
        for module in model.modules():
            quantizer, weight = getattr(module, "quantize_weight", None), getattr(module, "weight", None)
            if isinstance(quantizer, StatsQ) and isinstance(weight, nn.Parameter) and weight.requires_grad:
                first = 2 * len(weight) // 3 if isinstance(module, QueryKeyProjection) else 0  # its values' only
                self.held.append((weight, slice(first, None), quantizer))
        if not self.held:
            raise ValueError("no weight that learns is quantized by StatsQ, of less than 8 bits")
        self._before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def hold(self) -> None:
        """Take the gradients of frozen weights away, and remember the weights."""
        self._before = []
        for weight, rows, quantizer in self.held:
            frozen = far_from_rounding(weight[rows], quantizer, self.margin)
            if weight.grad is not None:
                weight.grad[rows].masked_fill_(frozen, 0)
            self._before.append((frozen, weight[rows].clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Let frozen weights be what they were: optimizers decay them, and have momentum."""
        for (weight, rows, _), (frozen, before) in zip(self.held, self._before, strict=False):
            weight[rows] = torch.where(frozen, before, weight[rows])
        self._before = []

    def share(self) -> tuple[int, int]:
        """Return how many weights are frozen now, of how many."""
        masks = [far_from_rounding(weight[rows], quantizer, self.margin) for weight, rows, quantizer in self.held]
        return sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
