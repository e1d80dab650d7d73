"""Reducer that decides for each token by itself whether it stays (IA-RED², arXiv:2106.12620)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.outputs import add_term
from visionzoo.layers.reducers.base import Choice, Reducer


class InterpreterReducer(Reducer):
    """Keeps the tokens that a learned product with the class token says to keep: images keep different numbers.

    A token's probability is the mean over the heads of sigmoid(q·k·D^-½), q of the class token and k of the token, both
    projections of the tokens after a norm without weights. Facts from score_net/ia_red_utils/IA_RED_model.py of
    https://github.com/joon-stack/ltrp at ba04d7f (no license), a copy by others of the authors' code for evaluation;
    theirs could not be had.

    The authors train the decisions by policy gradients, whose reward needs labels and which are left out here. Instead
    each token that stays is multiplied by 1 with the gradient of its probability, so that the loss moves it, and the
    term "kept" of the loss is the square of the mean probability, which their reward has for images that are classified
    rightly. Its weight is our choice, and nothing was trained with it.

    Args:
        dim: channels C.
        num_heads: heads.
        threshold: probability above which a token stays, in [0, 1).

    Raises:
        ValueError: if the heads do not divide the channels, or the threshold is out of range.
    """

    NEEDS_CLASS_TOKEN = True
    VARIES = True
    AUXILIARY = {"kept": 1.0}

    def __init__(self, dim: int, *, num_heads: int = 6, threshold: float = 0.5):
        super().__init__(dim)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"InterpreterReducer: num_heads must divide dim, got {dim=} and {num_heads=}; pass a num_heads that "
                f"divides {dim}"
            )
        if not 0 <= threshold < 1:
            raise ValueError(f"InterpreterReducer: threshold must be from 0 to below 1, got {threshold=}")
        self.num_heads, self.threshold = num_heads, threshold
        self.qk = nn.Linear(dim, 2 * dim)

    @staticmethod
    def places(depth: int) -> tuple[int, ...]:
        """Before the first block and after each third of them."""
        return tuple(sorted({0, depth // 3, 2 * depth // 3}))

    def probabilities(self, x: Tensor) -> Tensor:
        """Return with which each of the tokens [B, P + M, C] is to stay, [B, P + M], float32 at least."""
        qk = self.qk(F.layer_norm(x, x.shape[-1:]))
        q, k = qk.unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # [B, P + M, G, D]
        dtype = torch.promote_types(q.dtype, torch.float32)
        with without_autocast(x.device):
            products = torch.einsum("bgd,bngd->bng", q[:, 0].to(dtype), k.to(dtype))
            return (products * q.shape[-1] ** -0.5).sigmoid().mean(-1)

    def choose(self, x: Tensor, keep: Tensor | None, scores: Tensor | None, prefix: int, places: int) -> Choice:
        """Keep what is probable enough."""
        probability = self.probabilities(x)[:, prefix:]
        chosen = probability.detach() > self.threshold
        if keep is not None:
            probability, chosen = probability * keep, chosen & keep
        if not self.training:
            return Choice(chosen)
        add_term("kept", probability.mean(1).square().mean())
        return Choice(chosen, factor=1 + (probability - probability.detach()))
