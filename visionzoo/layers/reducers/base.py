"""What every reducer is: it takes the tokens before a block and leaves fewer."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionzoo.kernels.precision import double
from visionzoo.layers.part import Part
from visionzoo.layers.tokens import tokens_at
from visionzoo.layers.tracing import one_node, smaller
from visionzoo.text import count_of


class Choice(NamedTuple):
    """Which tokens stay."""

    chosen: Tensor  # [B, M], True for those
    number: int | None = None  # how many that is, for each image; None where images keep different numbers
    factor: Tensor | None = None  # [B, M], ones that carry the gradient of the decision; None for no gradient


class Reducer(Part):
    """Base of the reducers, which stand before the blocks of an isotropic model (`visionzoo.models._reducing`).

    In evaluation the tokens that are left move together, so that what follows costs less: their number is that of the
    image that keeps most, and images that keep fewer have padding. In training all tokens stay where they are, those
    dropped are zeros, and `Tokens.keep` hides them, so that shapes never change. What is computed of the others is the
    same. Prefix tokens always stay.

    Args:
        dim: channels C.

    Raises:
        ValueError: if there are none.
    """

    SCORES = ""  # what the block before is to say of its tokens, see `TokenBlock.score`
    NEEDS_CLASS_TOKEN = False
    VARIES = False  # whether images keep different numbers of tokens
    MAKES_TOKENS = False  # whether the tokens it leaves are new ones, that no longer are one of the map's each

    masked: bool | None = None  # whether dropped tokens stay as zeros; None for: in training, and in graphs if `VARIES`

    def __init__(self, dim: int):
        super().__init__()
        if dim < 1:
            raise ValueError(f"{type(self).__name__}: dim must be positive, got {dim=}")
        self.dim = dim

    @staticmethod
    def places(depth: int) -> tuple[int, ...]:
        """Return the blocks of a model of this depth before which it stands where the caller names none."""
        return tuple(sorted({max(1, depth * i // 4) for i in (1, 2, 3)} & {*range(depth)}))

    def choose(self, x: Tensor, keep: Tensor | None, scores: Tensor | None, prefix: int, places: int) -> Choice:
        """Say which tokens stay.

        Args:
            x: tokens [B, P + M, C].
            keep: which of the M are there, [B, M]; None for all.
            scores: what the block before gave for them, [B, M]; None where `SCORES` asks for nothing.
            prefix: P.
            places: N, places of the map.

        """
        raise NotImplementedError

    @one_node  # what it does depends on shapes, and on numbers where images keep different numbers of tokens
    def forward(
        self, x: Tensor, source: Tensor | None, keep: Tensor | None, scores: Tensor | None, prefix: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Take and return x, source and keep of `visionzoo.layers.tokens.Tokens`."""
        self.check_tokens(x, scores, prefix)
        places = x.shape[1] - prefix if source is None else source.shape[1]
        chosen, count, factor = self.choose(x, keep, scores, prefix, places)
        if factor is not None:
            x = torch.cat([x[:, :prefix], x[:, prefix:] * factor.unsqueeze(-1).to(x.dtype)], 1)
        if self._masks(x):
            return torch.cat([x[:, :prefix], x[:, prefix:] * chosen.unsqueeze(-1)], 1), source, chosen
        return gather(x, source, chosen, count, prefix)

    def check_tokens(self, x: Tensor, scores: Tensor | None, prefix: int) -> None:
        """Check tokens [B, P + M, C] and the scores [B, M] of them that the block before is to give.

        Raises:
            ValueError: if they are not such, or there are no scores.
        """
        self.check_inputs("B N C", x, any_dtype=True, C=self.dim)
        if not self.SCORES:
            return
        if scores is None:
            raise ValueError(
                f"{type(self).__name__}: expected scores [B, M] of the tokens behind {count_of(prefix, 'prefix token')}"
                f", their {self.SCORES} in the block before, got None; pass them"
            )
        self.check_inputs("B M", scores, any_dtype=True, B=x.shape[0], M=x.shape[1] - prefix)

    def _masks(self, x: Tensor) -> bool:
        if self.masked is not None:
            return self.masked
        return self.training or (self.VARIES and (torch.compiler.is_compiling() or x.is_meta))


def gather(
    x: Tensor, source: Tensor | None, chosen: Tensor, count: int | None, prefix: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Move the chosen tokens together, in their order.

    Args:
        x: tokens [B, P + M, C].
        source: which of the M each place of the map reads, [B, N], see `Tokens`; None for each its own.
        chosen: which of the M stay, [B, M].
        count: how many that are, for every image; None for the number of the image that keeps most.
        prefix: P.

    Returns:
        Tokens [B, P + K, C], their `source` [B, N], and which of them are no padding, [B, K], or None for all.
    """
    exact = count is not None
    if count is None:
        count = int(chosen.sum(1).amax()) if chosen.shape[0] else 0
    place = torch.arange(chosen.shape[1], device=x.device)
    order = (
        torch.where(chosen, -place, -place - chosen.shape[1]).topk(count, dim=1).indices
    )  # those that stay come first
    kept = chosen.gather(1, order)
    left = tokens_at(x[:, prefix:], order)
    if not exact:
        left = left * kept.unsqueeze(-1)
    to = torch.where(chosen, chosen.cumsum(1) - 1, -1)
    if source is not None and not chosen.shape[1]:
        to = source  # of no places: a reducer before left none
    elif source is not None:
        to = torch.where(source >= 0, to.gather(1, source.clamp(min=0)), -1)
    return torch.cat([x[:, :prefix], left], 1), to, None if exact else kept


class BestTokens(Reducer):
    """Keeps the tokens of the highest scores, a given share of them.

    Args:
        dim: channels C.
        keep_rate: share of the tokens that stay, in (0, 1]; their number is rounded up.
        of_map: take the share of the map's tokens, not of those that earlier reducers left.

    Raises:
        ValueError: if the share is none.
    """

    def __init__(self, dim: int, *, keep_rate: float = 0.7, of_map: bool = False):
        super().__init__(dim)
        self.keep_rate, self.of_map = check_rate(self, keep_rate), of_map

    def rank(self, x: Tensor, keep: Tensor | None, scores: Tensor | None, prefix: int) -> Tensor:
        """Return what the M tokens are ranked by, [B, M]."""
        assert scores is not None  # `check_tokens` has seen them
        return scores

    def choose(self, x: Tensor, keep: Tensor | None, scores: Tensor | None, prefix: int, places: int) -> Choice:
        """Keep the best: of all images as many, if they have as many."""
        ranked = self.rank(x, keep, scores, prefix)
        tokens = ranked.shape[1]
        if keep is None:
            count = self._count(tokens, places)
            best = ranked.topk(count, dim=1, sorted=False).indices
            return Choice(torch.zeros_like(ranked, dtype=torch.bool).scatter(1, best, True), count)
        counts = self._count(torch.arange(tokens + 1, device=x.device), places)
        order = ranked.masked_fill(~keep, float("-inf")).argsort(dim=1, descending=True)
        rank = torch.zeros_like(order).scatter(1, order, torch.arange(tokens, device=x.device).expand_as(order))
        return Choice(rank < counts[keep.sum(1, keepdim=True)])

    def _count(self, tokens: Any, places: int) -> Any:
        count = share_of(places if self.of_map else tokens, self.keep_rate)
        if not self.of_map:
            return count
        return tokens.clamp(max=count) if isinstance(tokens, Tensor) else smaller(tokens, count)


def share_of(tokens: Any, rate: float) -> Any:
    """Return a share of a number of tokens, or of a tensor of such numbers, rounded up.

    Of a number's symbol it is made by whole numbers, which files can hold.
    """
    if isinstance(tokens, Tensor):
        return (rate * double(tokens)).ceil()
    if isinstance(tokens, int):
        return ceil(rate * tokens)
    ratio = Fraction(rate).limit_denominator(10**6)
    return (ratio.numerator * tokens + ratio.denominator - 1) // ratio.denominator  # ONNX rounds towards zero


def check_rate(of: Any, keep_rate: float) -> float:
    """Return a share of tokens to keep.

    Raises:
        ValueError: if it is not above 0 and at most 1.
    """
    if not 0 < keep_rate <= 1:
        raise ValueError(
            f"{type(of).__name__}: keep_rate is the share of tokens that stay, above 0 and at most 1, got {keep_rate=}"
        )
    return keep_rate
