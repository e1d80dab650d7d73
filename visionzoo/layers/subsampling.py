"""Stochastically subsampled attention: in training all queries see the same few keys, drawn anew (arXiv:2306.01705).

    yᵢ = Σⱼ∈S softmaxⱼ(qᵢ·kⱼ / √D) vⱼ, S a random subset of the keys

Scores and weights are those of the subset only, in the same kernels: a share p of the keys costs the share p of the
multiply-adds and memory of attention. Each layer and batch draws its own subset, so a path through the layers is one of
very many sub-networks; evaluation sees all keys, or is the mean of several sub-networks (`SelfEnsemble`).

Facts from the paper; https://github.com/shamim-hussain/ssa at 88e0e31 announces code and has none. Of its two forms
this is the unbiased one; the one whose subsets are biased to near keys is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from visionzoo.text import count_of


@dataclass(frozen=True)
class Subsampling:
    """Which share of the keys is seen.

    Attributes:
        share: of the keys, above 0 and at most 1; at least one key is seen.
        always: subsample in evaluation too.
    """

    share: float
    always: bool = False

    def draw(self, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a random subset of keys [B, G, M, D], their values and their columns of a bias, in their order."""
        count = max(1, round(self.share * k.shape[-2]))
        seen = torch.rand(k.shape[-2], device=k.device).argsort()[:count].sort().values
        if bias is not None and bias.shape[-1] > 1:
            bias = bias.index_select(-1, seen)
        return k.index_select(-2, seen), v.index_select(-2, seen), bias


def subsample_attention(model: nn.Module, share: float, *, always: bool = False) -> tuple[int, int]:
    """Let the attention of a model's mixers see a random share of its keys from now on, in training; 1 ends it.

    Args:
        model: its mixers that say so by `SUBSAMPLES` are changed. They must not be given tokens to leave out.
        share: of the keys, above 0 and at most 1.
        always: in evaluation too.

    Returns:
        the number of mixers that are changed, and that of all mixers.

    Raises:
        ValueError: the share is out of its range.
    """
    from visionzoo.layers.mixers.base import set_on_mixers

    if not 0 < share <= 1:
        raise ValueError(f"expected a share of the keys above 0 and at most 1, got {share=}")
    return set_on_mixers(model, "SUBSAMPLES", "subsampling", Subsampling(share, always) if share < 1 else None)


class SelfEnsemble(nn.Module):
    """The mean of the probabilities that random sub-networks of a trained model give, as logits.

    Args:
        model: a classifier; its attention is subsampled in evaluation, too, from now on.
        share: of the keys that each sub-network sees, see `subsample_attention`.
        samples: number of sub-networks; the cost grows with it.

    Raises:
        ValueError: there is no sample, the share is out of its range, or no mixer of the model can be subsampled.
    """

    def __init__(self, model: nn.Module, share: float, samples: int) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"expected one sample at least, got {samples=}")
        changed, count = subsample_attention(model, share, always=True)
        if not changed:
            raise ValueError(
                f"{type(model).__name__} has {count_of(count, 'mixer')}, and none whose attention can be subsampled"
            )
        self.model, self.samples = model, samples

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to the logarithms of the probabilities, [B, classes], float32 at least."""
        total: Tensor | None = None
        for _ in range(self.samples):
            logits = self.model(images)
            logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            total = logs if total is None else torch.logaddexp(total, logs)
        assert total is not None
        return total - log(self.samples)
