"""Binary codes of tokens, so that products of codes tell which tokens are alike (EcoFormer, arXiv:2209.09004)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KernelHash(nn.Module):
    """Hash functions from kernels: a bit is the sign of a weighted sum of a token's kernels with a few anchors.

    The kernel of token and anchor is exp(-d / 2σ) less its mean, with d their squared distance and σ the mean of d over
    the tokens and anchors of a head, so that the codes of a map's tokens depend on each other. Weights, anchors and
    means are buffers: they are fitted to tokens (`visionzoo.layers.hash_fitting.fit`) and not trained. Before that the
    anchors are random directions. The gradient of the sign is taken as 1 where the sum is from -1 to 1, else as 0.

    Args:
        num_heads: heads G.
        head_dim: width D of a head.
        num_bits: bits of a code.
        num_anchors: anchors of each head.
    """

    weight: Tensor  # [G, bits, anchors]
    anchor: Tensor  # [1, G, anchors, D]
    mean: Tensor  # [1, G, 1, anchors]

    def __init__(self, num_heads: int, head_dim: int, *, num_bits: int, num_anchors: int):
        super().__init__()
        self.num_bits = num_bits
        self.num_anchors = num_anchors
        self.register_buffer("weight", torch.empty(num_heads, num_bits, num_anchors))
        self.register_buffer("anchor", torch.empty(1, num_heads, num_anchors, head_dim))
        self.register_buffer("mean", torch.empty(1, num_heads, 1, num_anchors))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw random hash functions: normal weights, anchors of length 1, and the kernel at a mean distance as mean."""
        self.weight.normal_()
        self.anchor.copy_(F.normalize(torch.randn_like(self.anchor), dim=-1))
        self.mean.fill_(math.exp(-0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, G, N, D] to codes [B, G, N, bits] of -1 and 1 (0 where a sum is)."""
        sums = (self.kernels(tokens) - self.mean.to(tokens.dtype)) @ self.weight.to(tokens.dtype).mT
        clipped = sums.clamp(-1, 1)
        return sums.sign() + (clipped - clipped.detach())  # the second part is 0 and has the gradient

    def kernels(self, tokens: Tensor) -> Tensor:
        """Tokens [B, G, N, D] to their kernels with the anchors [B, G, N, anchors], from 0 to 1."""
        anchor = self.anchor.to(tokens.dtype)
        lengths = tokens.square().sum(-1, keepdim=True) + anchor.square().sum(-1).unsqueeze(-2)
        distances = lengths - 2 * (tokens @ anchor.mT)
        spread = distances.mean((-2, -1), keepdim=True).clamp(min=torch.finfo(tokens.dtype).tiny)
        return (-distances / (2 * spread)).exp()
