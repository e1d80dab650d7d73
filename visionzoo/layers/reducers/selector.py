"""Reducer that keeps the tokens from which the others can be reconstructed (adaptive reduction, arXiv:2503.16660)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.mixers.full import FullMixer
from visionzoo.layers.outputs import add_term, collecting
from visionzoo.layers.reducers.base import BestTokens, Choice


class SelectorReducer(BestTokens):
    """Keeps the tokens that a small transformer selects; another one, in training, reconstructs the others from them.

    In training a token is kept by a Gumbel softmax over two logits. Terms of the loss are "reconstruction", the mean
    squared error of all tokens from those that were kept, with a learned token in place of the others, and "selected",
    the share that was kept; neither has a gradient for the blocks before. In evaluation the share `keep_rate` with the
    largest logits stays. Where nothing collects terms, the decision learns from the loss by a factor of 1 with its
    gradient, and the reconstruction learns nothing.

    "When Less is Enough" selects from the tokens that an encoder ends with, for a language model; here any block's are
    taken. There is no code of the authors: depth, widths, temperature and the weights of the terms are our choice.

    Args:
        dim: channels C.
        keep_rate: share of the tokens that stay in evaluation, in (0, 1]; their number is rounded up.
        of_map: take the share of the map's tokens, not of those that earlier reducers left.
        depth: blocks of either transformer.
        num_heads: their heads; None for a width of 32 or the next larger one.
        temperature: of the Gumbel softmax, above 0.

    Raises:
        ValueError: if the share is none, or a number is not positive.
    """

    AUXILIARY = {"reconstruction": 1.0, "selected": 0.1}

    def __init__(
        self,
        dim: int,
        *,
        keep_rate: float = 0.5,
        of_map: bool = False,
        depth: int = 1,
        num_heads: int | None = None,
        temperature: float = 1.0,
    ):
        super().__init__(dim, keep_rate=keep_rate, of_map=of_map)
        for name, number in {"depth": depth, "temperature": temperature}.items():
            if number <= 0:
                raise ValueError(f"SelectorReducer: {name} must be positive, got {name}={number}")
        self.temperature = temperature
        self.selector, self.reconstructor = (
            nn.ModuleList(Block(dim, FullMixer(dim, num_heads)) for _ in range(depth)) for _ in range(2)
        )
        self.norm, self.select = nn.LayerNorm(dim), nn.Linear(dim, 2)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        trunc_normal_(self.mask_token, std=0.02)

    def rank(self, x: Tensor, keep: Tensor | None, scores: Tensor | None, prefix: int) -> Tensor:
        """Return how much more a token is to be kept than not, [B, M]."""
        keeping, dropping = self._logits(x[:, prefix:], keep).unbind(-1)
        return keeping - dropping

    def choose(self, x: Tensor, keep: Tensor | None, scores: Tensor | None, prefix: int, places: int) -> Choice:
        """Keep the best, or in training those that are drawn."""
        if not self.training:
            return super().choose(x, keep, scores, prefix, places)
        tokens = x[:, prefix:]
        kept = F.gumbel_softmax(self._logits(tokens.detach(), keep), self.temperature, hard=True)[..., 0]
        kept = kept if keep is None else kept * keep
        if collecting():
            there = torch.ones_like(kept) if keep is None else keep.to(kept.dtype)
            total = there.sum().clamp(min=1)
            error = (self._reconstruct(tokens, kept, keep) - tokens.detach()).square().mean(-1)
            add_term("reconstruction", (error * there).sum() / total)
            add_term("selected", kept.sum() / total)
        return Choice(kept.detach() > 0.5, factor=1 + (kept - kept.detach()))

    def _logits(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        for block in self.selector:
            tokens = _apply(block, tokens, keep)
        return self.select(self.norm(tokens))

    def _reconstruct(self, tokens: Tensor, kept: Tensor, keep: Tensor | None) -> Tensor:
        share = kept.unsqueeze(-1).to(tokens.dtype)
        tokens = tokens.detach() * share + self.mask_token.to(tokens.dtype) * (1 - share)
        for block in self.reconstructor:
            tokens = _apply(block, tokens, keep)
        return tokens


def _apply(block: nn.Module, tokens: Tensor, keep: Tensor | None) -> Tensor:
    """Take tokens [B, M, C] through a block in which those that are not there are not seen."""
    x = tokens.unsqueeze(1)
    x = x + block.mixer(block.norm1(x), keep=keep)  # type: ignore[operator]
    return block.mix_channels(x).squeeze(1)  # type: ignore[operator]
