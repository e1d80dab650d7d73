"""Binary codes of tokens, so that products of codes tell which tokens are alike (EcoFormer, arXiv:2209.09004)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KernelHash(nn.Module):
    """Hash functions from kernels: a bit is the sign of a weighted sum of a token's kernels with a few anchors.

    The kernel of token and anchor is exp(-d / 2σ) less its mean, with d their squared distance and σ the mean of d over
    the tokens and anchors of a head, so that the codes of a map's tokens depend on each other. Weights, anchors and
    means are buffers: they are fitted to tokens (`fit_hash`) and not trained. Before that the
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
        """Draw random hash functions: normal weights, anchors of length 1, the kernel of a mean distance as mean."""
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


@torch.no_grad()
def fit_hash(
    functions: KernelHash,
    tokens: Tensor,
    *,
    neighbors: int = 10,
    steps: int = 100,
    learning_rate: float = 0.02,
    advance: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Fit hash functions to tokens, so that the codes of those that are alike agree (as EcoFormer's authors do).

    Anchors are drawn from the tokens. Then the bits are fitted one after the other, each to what the bits before leave
    of the targets: 1 between a token and those of its map that are most like it, -1 to those that are least. A bit
    starts from its present weights, moves by SGD with sigmoids instead of signs, and is kept for the heads where
    the signs fit better than before. Where we differ: anchors are from all maps, not only from the first; each head
    learns by itself, where their loss is the mean over heads; and the rate is forty times theirs, at which a hundred
    steps come nowhere near the best weights.

    Args:
        functions: are changed.
        tokens: [B, G, N, D] of length 1, float32 or float64; B maps of N tokens.
        neighbors: how many tokens most like another, and as many least like it; at most half of a map.
        steps: of SGD for each bit.
        learning_rate: of SGD with Nesterov momentum 0.9.
        advance: is called after each bit.

    Returns:
        `hash_error` of the tokens before the bits were fitted (but with the new anchors) and after.

    Raises:
        ValueError: if there are fewer tokens than anchors, a map is one token, or they are not finite.
    """
    batch, _, count, _ = tokens.shape
    if batch * count < functions.num_anchors or count < 2:
        raise ValueError(
            f"{batch} maps of {count} tokens are too few for {functions.num_anchors} anchors: expected as many tokens "
            "and at least 2 in a map; give more or larger images"
        )
    if not tokens.isfinite().all():
        raise ValueError("the tokens hold NaN or infinite values; nothing can be fitted to them")
    order = torch.randperm(batch * count)[: functions.num_anchors].to(tokens.device)
    functions.anchor.copy_(tokens.transpose(0, 1).flatten(1, 2)[:, order])
    kernels = functions.kernels(tokens)
    functions.mean.copy_(kernels.mean((0, 2), keepdim=True))
    kernels = kernels - functions.mean
    near, far = nearest_and_furthest(tokens, neighbors)
    before = hash_error(functions.forward(tokens), near, far)
    earlier: list[Tensor] = []  # the bits that are fitted, each [B, G, N]

    def misfit(bit: Tensor) -> Tensor:
        """Return for each head -Σ s·b·b' over pairs of tokens, with s what the earlier bits leave of the targets."""
        told = functions.num_bits * (bit * (_gathered(bit, near) - _gathered(bit, far)).sum(-1)).sum(-1)
        taken = sum((bit * other).sum(-1).square() for other in earlier)
        return (taken - told).mean(0) / (count * functions.num_bits)

    for i in range(functions.num_bits):
        start = functions.weight[:, i].to(tokens.dtype, copy=True)
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=learning_rate, momentum=0.9, nesterov=True)
        for _ in range(steps):
            with torch.enable_grad():
                loss = misfit(2 * (kernels @ weight.unsqueeze(-1)).squeeze(-1).sigmoid() - 1).sum()
            (weight.grad,) = torch.autograd.grad(loss, weight)
            optimizer.step()
        bits = [
            (kernels @ w.detach().unsqueeze(-1)).squeeze(-1).gt(0).to(tokens.dtype) * 2 - 1 for w in (start, weight)
        ]
        better = misfit(bits[1]) < misfit(bits[0])  # [G]
        functions.weight[:, i] = torch.where(better[:, None], weight, start).detach().to(functions.weight.dtype)
        earlier.append(torch.where(better[:, None], bits[1], bits[0]))
        advance()
    return before, hash_error(functions.forward(tokens), near, far)


def nearest_and_furthest(tokens: Tensor, neighbors: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Tokens [B, G, N, D] to the numbers of those most and least like each in its map: two of [B, G, N, k].

    k is `neighbors`, at most N / 2; `chunk` tokens are compared with all others at a time.
    """
    count = min(neighbors, tokens.shape[2] // 2)
    found: list[list[Tensor]] = [[], []]
    for one in tokens:
        parts = [part @ one.mT for part in one.split(chunk, dim=1)]
        for kept, largest in zip(found, (True, False), strict=True):
            kept.append(torch.cat([part.topk(count, largest=largest).indices for part in parts], dim=1))
    return torch.stack(found[0]), torch.stack(found[1])


def hash_error(codes: Tensor, near: Tensor, far: Tensor) -> float:
    """Mean squared error of the products of codes [B, G, N, bits], over the bits, as the similarity of two tokens.

    It is over all pairs in a map. The targets are 1 for `near` pairs, -1 for `far` ones, which `nearest_and_furthest`
    gives, and 0 for all others: bits that are tossed up have 1 / bits more than codes that are right.
    """
    bits, count = codes.shape[-1], codes.shape[-2]
    squares = (codes.mT @ codes / (bits * count)).square().sum((-2, -1)).mean()  # of the products, over all pairs
    told = sum((bit * (_gathered(bit, near) - _gathered(bit, far)).sum(-1)).mean() for bit in codes.unbind(-1))
    return float(squares + 2 * (near.shape[-1] - told / bits) / count)


def _gathered(values: Tensor, pairs: Tensor) -> Tensor:
    """Values [..., N] of the tokens that `pairs` [..., N, k] names: [..., N, k]."""
    return values.gather(-1, pairs.flatten(-2)).view(pairs.shape)
