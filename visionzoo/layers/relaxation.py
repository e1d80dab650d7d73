"""Relaxed attention: in training, weights of attention are smoothed by equal ones (arXiv:2209.09735).

    w̃ᵢⱼ = (1 - γ) wᵢⱼ + γ / N

As the output is linear in the weights, it is (1 - γ) times that of the attention as it is, by whatever kernel, plus γ
times the mean of the values: no weights are held for it. Evaluation is unchanged.

Facts from the paper; its authors announced code and have published none. There γ is one number, or for "fuzzy"
relaxation drawn from a normal distribution around it. Here it is drawn for each layer and batch anew and clamped to 0
and 1, and N are the keys that a query sees: those of its window, without padding that is masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Relaxation:
    """How far weights of attention are smoothed in training.

    Attributes:
        gamma: share of the equal weights, from 0 to 1.
        spread: standard deviation of the normal distribution around `gamma` that the share is drawn from; 0: no draw.
    """

    gamma: float
    spread: float = 0.0

    def relax(self, out: Tensor, uniform: Tensor) -> Tensor:
        """Return the output of relaxed attention, of that of the attention and that of equal weights."""
        if not self.spread:
            return out.lerp(uniform, self.gamma)
        draw = torch.randn((), dtype=torch.float32, device=out.device)
        return out.lerp(uniform, (self.gamma + self.spread * draw).clamp(0, 1).to(out.dtype))


def relax_attention(model: nn.Module, gamma: float, spread: float = 0.0) -> tuple[int, int]:
    """Relax the attention of a model's mixers in training from now on; gamma 0 with spread 0 ends it.

    Args:
        model: its mixers that say so by `RELAXES` are changed.
        gamma: share of the equal weights, from 0 to 1.
        spread: see `Relaxation`.

    Returns:
        the number of mixers that are relaxed, and that of all mixers.

    Raises:
        ValueError: a number is out of its range.
    """
    from visionzoo.layers.mixers.base import set_on_mixers

    if not 0 <= gamma <= 1 or spread < 0:
        raise ValueError(f"expected gamma from 0 to 1 and a spread from 0, got {gamma=} and {spread=}")
    return set_on_mixers(model, "RELAXES", "relaxation", Relaxation(gamma, spread) if gamma or spread else None)
