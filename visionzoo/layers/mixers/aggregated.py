"""Aggregated attention (TransNeXt, arXiv:2311.17132): a neighborhood and a pooled map in one softmax."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.kernels.regions import is_symbolic
from visionzoo.layers.attention import attend
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import on_nchw
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import windows
from visionzoo.layers.pooling import pool_cells
from visionzoo.layers.position import ContinuousPositionBias


class AggregatedMixer(Mixer):
    """Each token attends to the k×k tokens around it and to the M cells of the map, in one softmax.

        yᵢ = [softmaxⱼ(τ·cos(qᵢ, kⱼ) + bᵢⱼ) + qᵢ·Tⱼ over i's k × k window, over M cells] · v

    Time: O(N·(k² + M)·C) with M = N/r², or `pool_size`²; memory: O(N·(k²·C + M·G)).

    Scores are cosines times a learned temperature and the logarithm of the number of keys. A cell's key and value come
    from the mean of its tokens after a layer of their own. After the softmax each of the k² weights gets a further term
    from its query. Places of the window that are not on the map have no part in the softmax.

    r is `reduction`. Where it is 1, and there is no pool size, the keys are all tokens, without a window beside them.
    Cells need not divide the map; a map smaller than a cell is one. Softmax and sums are float32 at least.

    Facts from https://github.com/DaiShiResearch/TransNeXt at c8a9974 (Apache-2.0).

    Args:
        dim: channels C.
        num_heads: attention heads.
        window_size: side k of the window, odd.
        reduction: side of the cells in tokens, but for what a map has over.
        pool_size: cells along each axis, at most one a token, whatever the size of the map; None for what `reduction`
            gives.
        map_size: side of the maps that positions are relative to, or (height, width), for biases that extend beyond it
            on larger maps; None for each map's own, so that biases stretch with it.
        bias_size: side of the maps whose biases are interpolated for maps of other sizes, or (height, width); None to
            compute the biases of each size from its offsets.
        qkv_bias: whether the projections to q and to k, v have a bias.

    Raises:
        ValueError: if a size is not positive, or the window is even.

    >>> import torch
    >>> AggregatedMixer(64, 2, reduction=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: int = 3,
        reduction: int = 4,
        pool_size: int | None = None,
        map_size: int | tuple[int, int] | None = None,
        bias_size: int | tuple[int, int] | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        self.check_kernels(window_size=window_size)
        self.map_size: tuple[int, int] | None = None if map_size is None else to_2tuple(map_size)
        self.bias_size: tuple[int, int] | None = None if bias_size is None else to_2tuple(bias_size)
        if (
            reduction < 1
            or (pool_size is not None and pool_size < 1)
            or min(*(self.map_size or (1,)), *(self.bias_size or (1,))) < 1
        ):
            raise ValueError(
                f"{type(self).__name__}: reduction, pool_size, map_size and bias_size must be positive where they are "
                f"given, got {reduction=}, {pool_size=}, {map_size=} and {bias_size=}"
            )
        self.window_size, self.reduction, self.pool_size = window_size, reduction, pool_size
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.NO_WEIGHT_DECAY: tuple[str, ...] = ("query_embedding",)
        self.query_embedding = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        # softplus turns it into 1 / 0.24
        self.temperature = nn.Parameter(torch.full((self.num_heads,), math.log(math.expm1(1 / 0.24))))
        self.position_bias = ContinuousPositionBias(self.num_heads)
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.query_embedding, std=0.02)
        self.pooled = reduction > 1 or pool_size is not None
        if self.pooled:
            self.NO_WEIGHT_DECAY += ("window_bias",)
            self.sr = nn.Conv2d(dim, dim, 1)
            self.norm = LayerNorm(dim)
            self.window_bias = nn.Parameter(torch.zeros(self.num_heads, window_size**2))
            self.window_tokens = nn.Parameter(torch.zeros(self.num_heads, self.head_dim, window_size**2))
            self.window_offset = nn.Parameter(torch.zeros(self.num_heads, window_size**2))
            trunc_normal_(self.window_bias, std=0.0004)
            trunc_normal_(self.window_tokens, std=0.02)

    @property
    def pair_bytes(self) -> int:
        """Biases, in half precision at least, twice; none for a pooled map."""
        return 0 if self.pooled else 4 * self.num_heads

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        q = _unit(self.q(x).unflatten(-1, (self.num_heads, self.head_dim)))
        out = self._aggregate(q, x) if self.pooled else self._attend(q, x)
        return self.proj(self.weigh_heads(out, x).flatten(3))

    def weigh_heads(self, heads: Tensor, x: Tensor) -> Tensor:
        """Return what the heads say, [B, H, W, G, D], given the mixer's input [B, H, W, C]; all count the same here."""
        return heads

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit keys and values of a map, both [B, H, W, G, D]."""
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        return _unit(k), v

    def _scale(self, q: Tensor, count: Tensor) -> Tensor:
        """Lengthen unit queries [B, H, W, G, D] for their numbers of keys, broadcast to [H, W, 1, 1]."""
        temperature = F.softplus(self.temperature.to(q.dtype))[:, None] * count.log().to(q.dtype)
        return (q + self.query_embedding.to(q.dtype)) * temperature

    def _bias(self, x: Tensor, cells: tuple[int, int]) -> Tensor:
        size = (x.shape[1], x.shape[2])
        if self.bias_size is None or self.bias_size == size:
            return self.position_bias(size, cells, self.map_size or size, x)
        own = self.bias_size
        own_cells = self._cells_of(own) if self.pooled else own
        bias = self.position_bias(own, own_cells, self.map_size or own, x)  # [G, N, M] of the maps of `bias_size`
        bias = F.interpolate(bias.unflatten(2, own_cells), cells, mode="bilinear").flatten(2).mT
        return F.interpolate(bias.unflatten(2, own), size, mode="bilinear").flatten(2).mT

    def _attend(self, q: Tensor, x: Tensor) -> Tensor:
        """Attention to all tokens."""
        size = (x.shape[1], x.shape[2])
        k, v = self._keys(x)
        q = self._scale(q, torch.full((), size[0] * size[1], dtype=q.dtype, device=q.device))
        q, k, v = (t.to(v.dtype).flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # [B, G, N, D]
        out = attend(q, k, v, bias=self._bias(x, size).to(v.dtype), scale=1.0)
        return out.transpose(1, 2).unflatten(1, size)

    def _aggregate(self, q: Tensor, x: Tensor) -> Tensor:
        """Attention to the window and to the cells."""
        size, window = (x.shape[1], x.shape[2]), self.window_size
        cells = self._cells(x)
        k, v = (t.flatten(3) for t in self._keys(x))
        pooled_k, pooled_v = self._keys(self.norm(pool_cells(F.gelu(on_nchw(self.sr, x)), cells)))
        bias, dtype, wide = self._bias(x, cells), v.dtype, q.dtype
        rows, columns = (_inside(length, window, q.device) for length in size)
        inside = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2)  # [H, W, k²]
        scaled = self._scale(q, (inside.sum(-1) + cells[0] * cells[1]).float()[..., None, None])
        with without_autocast(x.device):
            # No matrix products: these would keep k² copies of the keys and values for the backward pass.
            near = windows(k, window).unflatten(3, q.shape[3:])  # [B, H, W, G, D, k, k]
            in_window = (scaled[..., None, None] * near).sum(4).flatten(4) + self.window_bias.to(wide)
            in_window = in_window.masked_fill(~inside[:, :, None], -torch.inf)
            of_window = _heads_first(in_window)  # [B, G, N, k²]
            of_cells = _heads_first(scaled) @ _heads_first(pooled_k).transpose(-2, -1) + bias.to(wide)  # [B, G, N, M]
            weights = torch.cat([of_window, of_cells], -1).softmax(-1)
            of_window, of_cells = weights[..., : window**2], weights[..., window**2 :]
            out = of_cells @ _heads_first(pooled_v.to(wide))
            further = _heads_first(q) @ self.window_tokens.to(wide) + self.window_offset.to(wide)[:, None]
            out, of_window = (t.transpose(1, 2).unflatten(1, size) for t in (out, of_window + further))
            near = windows(v.to(wide), window).unflatten(3, q.shape[3:])
            out = out + (of_window.unflatten(-1, (1, window, window)) * near).sum((-2, -1))
        return out.to(dtype)

    def _cells(self, x: Tensor) -> tuple[int, int]:
        """How many cells a map has along each axis."""
        if is_symbolic(x):
            raise ValueError(
                f"{type(self).__name__}: torch.export cannot make a program for maps of any size where the number of "
                f"cells depends on the size; export it for one image size"
            )
        return self._cells_of((x.shape[1], x.shape[2]))

    def _cells_of(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (
            max(side // self.reduction, 1) if self.pool_size is None else min(side, self.pool_size) for side in size
        )
        return height, width


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _heads_first(x: Tensor) -> Tensor:
    """[B, H, W, G, ...] to [B, G, N, ...]."""
    return x.flatten(1, 2).transpose(1, 2)


def _inside(length: int, window: int, device: torch.device) -> Tensor:
    """Whether each place of each token's window is on the axis, [length, window]."""
    place = torch.arange(length, device=device)[:, None] + torch.arange(window, device=device) - window // 2
    return (place >= 0) & (place < length)
