"""Attention along connections that are predicted for each image (Sparsifiner, arXiv:2303.13755)."""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.attention import attend, attention_received, attention_weights, hide
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.outputs import add_term, collecting
from visionzoo.layers.position import places_of, resize_table


class ConnectionPredictor(nn.Module):
    """Approximates attention by products of low rank.

    Queries and keys become narrower, and keys are summed to R, with a learned weight for each token. A query's
    coefficients are the softmax of its products with these; the largest of them weigh the rows of a learned basis
    [R, N], without signs and without what is small.

    Args:
        head_dim: width D of the heads, which share the predictor.
        num_heads: heads; as released their inverse root scales the products.
        size: height and width of the map that the tables are made for; others interpolate them.
        prefix_tokens: tokens before it that the tables have rows for.
        reduce_tokens: tokens over R, rounded down.
        reduce_width: D over the narrower width, rounded down.
        coefficients: how many of the R a query uses.
        threshold: numbers of the basis up to this one count as 0.
    """

    NO_WEIGHT_DECAY = ("to_basis", "basis")

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        size: tuple[int, int],
        prefix_tokens: int,
        reduce_tokens: int,
        reduce_width: int,
        coefficients: int,
        threshold: float,
    ):
        super().__init__()
        tokens = prefix_tokens + size[0] * size[1]
        rank, width = max(1, tokens // reduce_tokens), max(1, head_dim // reduce_width)
        self.size, self.prefix_tokens, self.scale = size, prefix_tokens, num_heads**-0.5
        self.coefficients, self.threshold = min(coefficients, rank), threshold
        self.proj_q, self.proj_k = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.to_basis, self.basis = (nn.Parameter(torch.zeros(tokens, rank)) for _ in range(2))
        trunc_normal_(self.to_basis, std=0.02)
        trunc_normal_(self.basis, std=0.02)

    def forward(
        self, q: Tensor, k: Tensor, size: tuple[int, int], prefix: int, places: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """Return attention of the map's queries to all tokens, approximately: [B, G, M, P + M], float32 at least.

        Args:
            q: queries [B, G, P + M, D].
            k: keys [B, G, P + M, D].
            size: height and width of the map.
            prefix: P.
            places: where on the map each of the M tokens is, [B, M]; None for M = H·W, in order.
            keep: which tokens are there, [B, P + M]; None for all.
        """
        q, k = self.proj_q(q[:, :, prefix:]), self.proj_k(k)
        if keep is not None:
            k = k.masked_fill(~keep[:, None, :, None], 0)
        dtype = torch.promote_types(q.dtype, torch.float32)
        share = self.size[0] * self.size[1] / (size[0] * size[1])  # keys of larger maps are more: their sums stay
        with without_autocast(q.device):
            to_basis = self._table(self.to_basis, size, prefix, places).to(dtype) * share
            basis = F.threshold(self._table(self.basis, size, prefix, places).to(dtype).abs(), self.threshold, 0.0)
            coefficients = (q.to(dtype) @ (k.to(dtype).mT @ to_basis) * self.scale).softmax(-1)  # [B, G, M, R]
            best, at = coefficients.topk(self.coefficients, sorted=False)
            return torch.zeros_like(coefficients).scatter(-1, at, best) @ basis.mT

    def _table(self, table: Tensor, size: tuple[int, int], prefix: int, places: Tensor | None) -> Tensor:
        """Return a table's rows of P prefix tokens and of M tokens of a map of this size: [B or 1, 1, P + M, R]."""
        own = self.prefix_tokens
        before = F.pad(table[:own], (0, 0, 0, max(0, prefix - own)))[:prefix]  # further tokens have rows of zeros
        on_map = resize_table(table[own:].unflatten(0, self.size)[None], size, "bilinear").flatten(1, 2)
        if places is not None:
            on_map = on_map[0][places]
        return torch.cat([before.expand(on_map.shape[0], -1, -1), on_map], 1).unsqueeze(1)


class SparsifinerMixer(Mixer):
    """Every token attends to the tokens that are predicted to matter to it.

        yᵢ = Σ over j ∈ top(predicted aᵢ) of softmaxⱼ(qᵢ·kⱼ / √D) vⱼ

    Time: O(N²·C); memory: O(N²·G).

    A query of the map sees the keys to which its approximate attention (`ConnectionPredictor`) is largest, prefix
    tokens see all. As released, all products are computed and the others hidden: what could be saved, is not. As
    released, too, prefix tokens see those that a reducer dropped, as zeros: a part of their attention goes to nothing.

    In training the choice has the approximation's gradient, where the authors train the predictor by attention's
    reconstruction only; that is the term "attention" of the loss: squared differences to full attention, summed over
    heads, queries and keys, as a mean over images. Scores, softmax and sums are float32 at least.

    Facts from https://github.com/lim142857/Sparsifiner at 9a11e26 (MIT).

    Args:
        dim: channels C.
        num_heads: attention heads.
        qkv_bias: whether the projection to q, k, v has a bias.
        keep_rate: share of all tokens that a query sees, in (0, 1]; their number is rounded up, and is at most that of
            the map's tokens where some are dropped.
        map_size: height and width, or side, of the map that the predictor is made for; others interpolate its tables.
        prefix_tokens: tokens before it that the predictor has weights for.
        reduce_tokens: tokens over the predictor's rank.
        reduce_width: width of the heads over that of the predictor's.
        coefficients: how many of its rows a query's approximation is made of.
        threshold: numbers of its basis up to this one count as 0.

    Raises:
        ValueError: if the heads do not divide the channels, or a number is out of its range.

    >>> SparsifinerMixer(64, 2, map_size=(5, 7))(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    SCORE_MAP = True
    SCORES = ("class_attention",)
    AUXILIARY = {"attention": 0.002}  # the authors' weight, of sums over a batch and a mean over the blocks
    needs_places = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        qkv_bias: bool = False,
        keep_rate: float = 0.25,
        map_size: int | tuple[int, int] = 14,
        prefix_tokens: int = 1,
        reduce_tokens: int = 6,
        reduce_width: int = 2,
        coefficients: int = 8,
        threshold: float = 0.02,
    ):
        super().__init__(dim, num_heads)
        size = to_2tuple(map_size)
        least = {"map_size": min(size), "reduce_tokens": reduce_tokens, "reduce_width": reduce_width}
        for name, number in {**least, "coefficients": coefficients}.items():
            if number < 1:
                raise ValueError(f"SparsifinerMixer: {name} must be positive, got {name}={number}")
        for name, number in {"prefix_tokens": prefix_tokens, "threshold": threshold}.items():
            if number < 0:
                raise ValueError(f"SparsifinerMixer: {name} must not be negative, got {name}={number}")
        if not 0 < keep_rate <= 1:
            raise ValueError(
                f"SparsifinerMixer: keep_rate is the share of tokens that a query sees, above 0 and at most 1, got "
                f"{keep_rate=}"
            )
        self.keep_rate = keep_rate
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.predictor = ConnectionPredictor(
            self.head_dim,
            self.num_heads,
            size=size,
            prefix_tokens=prefix_tokens,
            reduce_tokens=reduce_tokens,
            reduce_width=reduce_width,
            coefficients=coefficients,
            threshold=threshold,
        )
        self.proj = nn.Linear(dim, dim)

    @property
    def pair_bytes(self) -> int:
        """Approximate weights, their order and its inverse, of eight bytes each."""
        return 20 * self.num_heads

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: all see them or not, and they see all."""
        return True

    @property
    def takes_dropped_tokens(self) -> bool:
        """Yes."""
        return True

    def forward(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        score: str = "",
        map_size: tuple[int, int] | None = None,
        prefix: int = 0,
        source: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, H, W, C] to [B, H, W, C]; with `score` also what the first token gives to each, [B, N].

        Args:
            x: map, or with `map_size` P + M tokens [B, 1, P + M, C].
            keep: tokens that others see, [B, P + M]; None for all.
            score: "class_attention" for scores, a mean over the heads; "" for none.
            map_size: height and width of the map.
            prefix: P.
            source: which of the M tokens its places read, see `visionzoo.layers.tokens.Tokens`; None for all in order.
        """
        self.check_input(x)
        size = x.shape[1:3] if map_size is None else map_size
        # [B, H, W, G, D] -> [B, G, P + M, D]
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in self.split_heads(self.qkv(x)))
        places = None if source is None else places_of(source, q.shape[2] - prefix)
        approximate = self.predictor(q, k, (size[0], size[1]), prefix, places, keep)
        hidden = hide(keep, approximate.dtype)
        if self.training and collecting():
            add_term("attention", _difference(q, k, approximate, hidden, prefix))
        bias = self._hide_others(approximate, keep, prefix, size[0] * size[1], reduced=source is not None)
        if keep is not None or source is not None:  # one more key, for all that are gone
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            left = q.shape[2] - prefix if keep is None else keep[:, prefix:].sum(1)
            gone = bias.new_ones(x.shape[0]) * (size[0] * size[1] - left)
            column = gone.log().view(-1, 1, 1, 1).expand(-1, bias.shape[1], prefix, 1)
            bias = torch.cat([bias, F.pad(column, (0, 0, 0, bias.shape[2] - prefix), value=float("-inf"))], 3)
        out = self.proj(attend(q, k, v, bias=bias.to(q.dtype)).transpose(1, 2).reshape(x.shape))
        if not score:
            return out
        return out, attention_received(q[:, :, :1], k, bias[:, :, :1])[:, : q.shape[2]]

    def _hide_others(self, approximate: Tensor, keep: Tensor | None, prefix: int, places: int, reduced: bool) -> Tensor:
        """Return a bias [B, G, P + M, P + M] by which each query sees the keys of its own choice."""
        budget: int | Tensor = ceil(self.keep_rate * (prefix + places))
        ranked = fixed = approximate.detach()
        if keep is not None:
            ranked = ranked.masked_fill(~keep[:, None, None], float("-inf"))
            budget = keep[:, prefix:].sum(1).clamp(max=budget).view(-1, 1, 1, 1)
        elif reduced:
            budget = min(budget, approximate.shape[2])
        order = ranked.argsort(dim=-1, descending=True, stable=True)  # of equals the first
        at = torch.arange(order.shape[-1], device=order.device)
        seen = torch.zeros_like(order).scatter(-1, order, at.expand_as(order)) < budget
        value = approximate - fixed if self.training else torch.zeros_like(fixed)  # 0 with the gradient, or without
        bias = torch.where(seen, value, float("-inf"))
        first = bias.new_zeros(*bias.shape[:2], prefix, bias.shape[-1])
        if keep is not None:
            first = first.masked_fill(~keep[:, None, None], float("-inf"))
        return torch.cat([first, bias], 2)


def _difference(q: Tensor, k: Tensor, approximate: Tensor, hidden: Tensor | None, prefix: int) -> Tensor:
    """Return the squared difference of the map's attention and the approximate one, summed, as a mean over images."""
    difference = approximate - attention_weights(q[:, :, prefix:], k, hidden)
    if hidden is not None:
        there = hidden == 0  # [B, 1, 1, P + M]
        difference = difference * there * there[..., prefix:].mT
    return difference.square().sum() / q.shape[0]
