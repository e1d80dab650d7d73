"""CBAM (Woo et al., arXiv:1807.06521): a channel gate, then a spatial gate.

Facts from https://github.com/Jongchan/attention-module at 459efad (MIT license); the code here is our own. The spatial
gate's batch norm is the repository's, the paper has none.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.gates.base import Gate


class SpatialConv(ConvNorm):
    """k×k convolution of two maps [B, H, W, 2] to one [B, H, W, 1], with batch norm; of CBAM and triplet attention."""

    def __init__(self, kernel_size: int):
        norm = partial(nn.BatchNorm2d, momentum=0.01)
        super().__init__(2, 1, kernel_size, padding=kernel_size // 2, bias=False, norm_layer=norm)


def max_and_mean(x: Tensor, axis: int) -> Tensor:
    """Return maximum and mean along an axis, beside each other on a new last axis."""
    return torch.stack([x.max(axis).values, x.mean(axis)], -1)


class CbamGate(Gate):
    """Scale channels by an MLP of their pooled values, then positions by a convolution of theirs; O(N·(C + k²)).

    Channels: each pooling of the map passes the same MLP, the results are added, a sigmoid gives the factors.
    Positions: maximum and mean over the channels pass a convolution and batch norm, a sigmoid gives the factors.
    "lp" and "lse" pool in float32 at least, the rest has the dtype of the input or of autocast.

    Args:
        dim: channels C.
        reduction: C over the MLP's hidden width.
        pool_types: poolings of the map, of "avg", "max", "lp" (the Euclidean norm), "lse" (log of the sum of
            exponentials).
        spatial: have the spatial gate.
        kernel_size: side of its kernel, odd.

    Raises:
        ValueError: if a pooling is unknown or there is none, nothing remains of the channels, or the kernel is even.

    >>> import torch
    >>> CbamGate(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    POOLS = ("avg", "max", "lp", "lse")

    def __init__(
        self,
        dim: int,
        *,
        reduction: float = 16,
        pool_types: tuple[str, ...] = ("avg", "max"),
        spatial: bool = True,
        kernel_size: int = 7,
    ):
        super().__init__(dim)
        self.check_kernels(kernel_size=kernel_size)
        if not pool_types or not set(pool_types) <= set(self.POOLS):
            raise ValueError(f"CbamGate: pool_types must be some of {self.POOLS}, got {pool_types=}")
        self.pool_types = tuple(pool_types)
        hidden = self.reduced(reduction, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.spatial = SpatialConv(kernel_size) if spatial else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        tokens = x.flatten(1, 2)
        scores = sum(self.mlp(_pool(tokens, kind)) for kind in self.pool_types)
        x = x * torch.sigmoid(scores)[:, None, None]  # type: ignore[arg-type, index]
        return x if self.spatial is None else x * torch.sigmoid(self.spatial(max_and_mean(x, 3)))


def _pool(tokens: Tensor, kind: str) -> Tensor:
    """Pool [B, N, C] over the positions: [B, C]."""
    if kind == "avg":
        return tokens.mean(1)
    if kind == "max":
        return tokens.max(1).values
    exact = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    pooled = torch.linalg.vector_norm(exact, dim=1) if kind == "lp" else exact.logsumexp(1)
    return pooled.to(tokens.dtype)
