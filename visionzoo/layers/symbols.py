"""Symbols that tag tokens in relational attention (dual attention transformer, arXiv:2405.16727).

Facts from symbol_retrieval.py of https://github.com/Awni00/dual-attention at a6ef87c (MIT). A retriever takes tokens
[B, N, C] and returns a symbol for each, [B, N, C], or one for each distance from one token to another in their order,
-(N - 1) to N - 1: [2·N - 1, C].
"""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionzoo.layers.attention import attend
from visionzoo.layers.tracing import one_node


class SymbolicAttention(nn.Module):
    """Tokens attend to templates, whose symbols they get.

    Args:
        dim: channels C.
        num_heads: heads of this attention.
        num_symbols: templates, and symbols.
        trainable: whether the symbols learn; the templates do.

    Raises:
        ValueError: if the heads do not divide the channels, or there are no symbols.
    """

    NO_WEIGHT_DECAY = ("templates", "library")

    def __init__(self, dim: int, *, num_heads: int = 1, num_symbols: int = 16, trainable: bool = True):
        super().__init__()
        if num_heads < 1 or dim % num_heads or num_symbols < 1:
            raise ValueError(
                f"symbols: num_heads must divide {dim=}, and there must be symbols, got {num_heads=} and {num_symbols=}"
            )
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.templates = nn.Parameter(torch.randn(num_symbols, dim))
        self.library = nn.Parameter(torch.randn(num_symbols, dim), requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]."""
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
            for t in (self.q(x), self.templates.to(x.dtype), self.library.to(x.dtype))
        )
        out = attend(q, *(t.expand(x.shape[0], -1, -1, -1) for t in (k, v)))
        return out.transpose(1, 2).flatten(2)


class RelationalSymbols(nn.Module):
    """Symbolic attention by a token's relations to its neighbors, those before and after it in the tokens' order.

    Beyond the ends the neighbor is the first or last token.

    Args:
        dim: channels C.
        relation_heads: relations to each neighbor.
        neighbors: how many on a side.
        causal: only those before the token.
        include_self: the token is a neighbor of its own.
        normalize: have a softmax over the neighbors.
        num_heads: heads of the symbolic attention.
        num_symbols: its symbols.
        neighbours: the earlier name of `neighbors`.

    Raises:
        ValueError: if the heads do not divide the channels, or there are no symbols or neighbors.
    """

    def __init__(
        self,
        dim: int,
        *,
        relation_heads: int = 1,
        neighbors: int = 2,
        causal: bool = True,
        include_self: bool = False,
        normalize: bool = True,
        num_heads: int = 1,
        num_symbols: int = 16,
        neighbours: int | None = None,
    ):
        super().__init__()
        neighbors = neighbors if neighbours is None else neighbours
        if relation_heads < 1 or dim % relation_heads or neighbors < 1:
            raise ValueError(
                f"symbols: relation_heads must divide {dim=}, and there must be neighbors, got {relation_heads=} and "
                f"{neighbors=}"
            )
        before = [range(int(include_self) - 1, -neighbors - 1, -1)]
        both = [range(-neighbors, int(include_self)), range(1, neighbors + 1)]
        self.steps = before if causal else both  # from a token to its neighbors
        self.relation_heads, self.normalize = relation_heads, normalize
        self.symbolic = SymbolicAttention(dim, num_heads=num_heads, num_symbols=num_symbols)
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(relation_heads * sum(map(len, self.steps)), dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]."""
        count = x.shape[1]
        places = torch.arange(count, device=x.device)[:, None]
        places = places + torch.cat([torch.arange(r.start, r.stop, r.step, device=x.device) for r in self.steps])
        q, k = (t.unflatten(-1, (self.relation_heads, -1)) for t in (self.q(x), self.k(x)))
        k = k.index_select(1, places.clamp(0, count - 1).flatten()).unflatten(1, (count, -1))  # [B, N, steps, G, D]
        relations = (q.unsqueeze(2) * k).sum(-1)
        if self.normalize:
            relations = (relations * q.shape[-1] ** -0.5).softmax(2)
        return self.symbolic(self.proj(relations.flatten(2)))


class PositionalSymbols(nn.Module):
    """A learned symbol for each place in the order of tokens.

    Args:
        dim: channels C.
        max_length: places; more tokens are refused.

    Raises:
        ValueError: if there are none.
    """

    NO_WEIGHT_DECAY = ("library",)

    def __init__(self, dim: int, *, max_length: int = 197):
        super().__init__()
        if max_length < 1:
            raise ValueError(f"symbols: max_length must be positive, got {max_length=}")
        self.library = nn.Parameter(torch.randn(max_length, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C].

        Raises:
            ValueError: if there are more tokens than symbols.
        """
        if x.shape[1] > len(self.library):
            raise ValueError(
                f"PositionalSymbols: expected at most {len(self.library)} tokens, got {x.shape[1]}; pass a larger "
                f"max_length, or symbols='position_relative', which are for any number"
            )
        return self.library[: x.shape[1]].to(x.dtype).expand(x.shape[0], -1, -1)


class RelativeSymbols(nn.Module):
    """A learned symbol for each distance from a token to another in the tokens' order.

    Args:
        dim: channels C.
        max_distance: distances beyond it have the symbol of this one.

    Raises:
        ValueError: if it is negative.
    """

    NO_WEIGHT_DECAY = ("table",)

    def __init__(self, dim: int, *, max_distance: int = 197):
        super().__init__()
        if max_distance < 0:
            raise ValueError(f"symbols: max_distance must not be negative, got {max_distance=}")
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.empty(2 * max_distance + 1, dim))
        trunc_normal_(self.table, std=0.02)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [2·N - 1, C]."""
        distances = torch.arange(1 - x.shape[1], x.shape[1], device=x.device)
        return self.table.to(x.dtype)[distances.clamp(-self.max_distance, self.max_distance) + self.max_distance]


def by_distance(weights: Tensor) -> Tensor:
    """Lay out weights [B, G, N, N] by distance from query to key: [B, G, N, 2·N - 1], zeros where there is no key."""
    count = weights.shape[-1]
    queries, distances = (torch.arange(n, device=weights.device) for n in (count, 2 * count - 1))
    keys = queries[:, None] + distances + (1 - count)  # [N, 2·N - 1]
    there = (keys >= 0) & (keys < count)
    laid = weights.gather(-1, keys.clamp(0, count - 1).expand(*weights.shape[:2], -1, -1))
    return laid * there.to(weights.dtype)


SYMBOLS: dict[str, type[nn.Module]] = {
    "position_relative": RelativeSymbols,
    "positional": PositionalSymbols,
    "relational": RelationalSymbols,
    "symbolic_attention": SymbolicAttention,
}
