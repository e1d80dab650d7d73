"""Heads of self-attention beside heads of relational attention (dual attention transformer, arXiv:2405.16727)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.attention import attend
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.specs import build_spec
from visionzoo.layers.symbols import SYMBOLS, by_distance

MAX_STRIDE = 2**31 - 1  # between rows of a matrix that BLAS multiplies
QUERIES = 1024  # of a part, where rows are further apart


class DualAttentionMixer(Mixer):
    """Some heads attend to the tokens' values, the others to their relations and symbols.

        yᵢ = [Σⱼ αᵢⱼ vⱼ, Σⱼ αᵢⱼ (W rᵢⱼ + sⱼ)], rᵢⱼ relations of i and j

    Time: O(N²·C); memory: O(N²·(G + R)) with G relational heads.

    A relational head with weights α (softmax, as any head's) returns Σⱼ αᵢⱼ (W rᵢⱼ + sⱼ): rᵢⱼ are R relations of tokens
    i and j, scaled products of projections that all heads share, and sⱼ is a projection of j's symbol, or of that of
    the distance from i to j. Both kinds have output projections of their own. Scores, relations and sums are float32 at
    least; those of relational heads are held at once.

    Facts from https://github.com/Awni00/dual-attention at a6ef87c (MIT).

    Args:
        dim: channels C.
        num_heads: heads of both kinds, of width D.
        relational_heads: how many of them are relational; None for half, at least one.
        num_relations: relations R; None for as many as relational heads. Their width is what they divide of those
            heads'.
        symmetric_relations: one projection for both tokens of a relation.
        relation_activation: of the relations, one of `ACTIVATIONS`.
        symbols: a name of `visionzoo.layers.symbols.SYMBOLS` or `dict(type=name, **options)`; "given" where `forward`
            gets them.

    Raises:
        ValueError: if the heads do not divide the channels, there are more relational ones, the relations do not divide
            their width, or an activation or kind of symbols is unknown.

    >>> DualAttentionMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda x: x,
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "gelu": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "softmax": lambda x: x.softmax(-1),  # over the tokens j
    }

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        relational_heads: int | None = None,
        num_relations: int | None = None,
        symmetric_relations: bool = False,
        relation_activation: str = "identity",
        symbols: Any = "symbolic_attention",
    ):
        super().__init__(dim, num_heads)
        relational_heads = max(1, self.num_heads // 2) if relational_heads is None else relational_heads
        if not 1 <= relational_heads <= self.num_heads:
            raise ValueError(
                f"DualAttentionMixer: relational_heads must be from 1 to num_heads={self.num_heads}, got "
                f"{relational_heads=}"
            )
        width = relational_heads * self.head_dim
        self.num_relations = relational_heads if num_relations is None else num_relations
        if self.num_relations < 1 or width % self.num_relations:
            raise ValueError(
                f"DualAttentionMixer: num_relations must divide the relational heads' width {width}, got "
                f"{num_relations=}"
            )
        if relation_activation not in self.ACTIVATIONS:
            raise ValueError(
                f"DualAttentionMixer: unknown {relation_activation=}, expected one of {tuple(self.ACTIVATIONS)}"
            )
        self.relational_heads, self.relation_activation = relational_heads, relation_activation
        self.symmetric_relations = symmetric_relations
        self_width = dim - width
        self.qkv = nn.Linear(dim, 3 * self_width, bias=False) if self_width else None
        self.proj = nn.Linear(self_width, self_width, bias=False) if self_width else None
        self.relational_qk = nn.Linear(dim, 2 * width, bias=False)
        self.relation_qk = nn.Linear(dim, width if symmetric_relations else 2 * width, bias=False)
        self.symbol_v = nn.Linear(dim, width, bias=False)
        self.relation_v = nn.Parameter(torch.empty(relational_heads, self.head_dim, self.num_relations))  # W
        nn.init.kaiming_uniform_(self.relation_v, a=math.sqrt(5))
        self.relational_proj = nn.Linear(width, width, bias=False)
        self.symbols = None if symbols == "given" else build_spec("symbols", symbols, SYMBOLS, dim)

    @property
    def pair_bytes(self) -> int:
        """Weights of the relational heads, and relations."""
        return 4 * (self.relational_heads + self.num_relations)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: they are the first in the tokens' order, where symbols depend on it."""
        return True

    def forward(self, x: Tensor, *, symbols: Tensor | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C].

        Args:
            x: map.
            symbols: [B, H·W, C], or those of distances [2·H·W - 1, C]; None for the mixer's own.
        """
        self.check_input(x)
        tokens = x.flatten(1, 2)
        if symbols is None:
            assert self.symbols is not None
            symbols = self.symbols(tokens)
        out = self.relational_proj(self._relate(tokens, symbols))
        if self.qkv is not None and self.proj is not None:
            q, k, v = self.qkv(tokens).unflatten(-1, (3, -1, self.head_dim)).transpose(1, 3).unbind(2)  # [B, G, N, D]
            out = torch.cat([self.proj(attend(q, k, v).transpose(1, 2).flatten(2)), out], -1)
        return out.unflatten(1, x.shape[1:3])

    def _relate(self, x: Tensor, symbols: Tensor) -> Tensor:
        """[B, N, C] to what the relational heads see, [B, N, G·D]."""
        heads = (self.relational_heads, self.head_dim)
        relations = (1 if self.symmetric_relations else 2, self.num_relations, -1)
        q, k = self.relational_qk(x).unflatten(-1, (2, *heads)).transpose(1, 3).unbind(2)  # [B, G, N, D]
        pair = self.relation_qk(x).unflatten(-1, relations).transpose(1, 3)  # [B, R, 1 or 2, N, D']
        v = self.symbol_v(symbols).unflatten(-1, heads).transpose(-2, -3)  # [B, G, N, D] or [G, 2·N - 1, D]
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):
            q, k, v, pair = (t.to(dtype) for t in (q, k, v, pair))
            weights = (q @ k.mT * self.head_dim**-0.5).softmax(-1)  # [B, G, N, N]
            scores = pair[:, :, 0] @ pair[:, :, -1].mT * pair.shape[-1] ** -0.5  # [B, R, N, N]
            scores = self.ACTIVATIONS[self.relation_activation](scores)
            related = _relate_rows(weights, scores).transpose(1, 2) @ self.relation_v.to(dtype).mT  # [B, G, N, D]
            out = related + (weights if v.ndim == 4 else by_distance(weights)) @ v
        return out.transpose(1, 2).flatten(2).to(x.dtype)


def _relate_rows(weights: Tensor, relations: Tensor) -> Tensor:
    """Sum relations [B, R, N, N] by weights [B, G, N, N] over the last tokens, to [B, N, G, R].

    A query's factors have rows N·N numbers apart: where BLAS does not take that, the queries go in parts, copied.
    """
    if torch.compiler.is_compiling() or weights.shape[2] * weights.shape[3] <= MAX_STRIDE:
        return weights.transpose(1, 2) @ relations.permute(0, 2, 3, 1)
    parts = zip(weights.split(QUERIES, 2), relations.split(QUERIES, 2), strict=True)
    return torch.cat([w.transpose(1, 2).contiguous() @ r.permute(0, 2, 3, 1).contiguous() for w, r in parts], 1)
