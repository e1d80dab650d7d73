"""Scores of attention, and what is done to scores or weights before and after they are normalized.

Scores are [B, G, R, N]: of R queries, which follow each other in the order of the map's tokens, and all N keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.layers.position import resize_table

Rows = Callable[[int, int], Tensor]  # (start, stop) of the queries -> [B, G, stop - start, N]


def squared_distances(q: Tensor, k: Tensor) -> Tensor:
    """|q - k|² of queries [B, G, R, D] and keys [B, G, N, D]."""
    lengths = q.square().sum(-1)[..., None] + k.square().sum(-1)[..., None, :]
    return (lengths - 2 * q @ k.transpose(-2, -1)).clamp(min=0)


def inverse_distances(q: Tensor, k: Tensor, power: float, eps: float) -> Tensor:
    """-log(ε + |q - k|^power): softmax of it weighs keys by 1 / (ε + |q - k|^power)."""
    squares = squared_distances(q, k)
    logs = squares.clamp(min=torch.finfo(squares.dtype).tiny).log() * (power / 2)
    return -torch.logaddexp(logs, logs.new_full((), eps).log())  # the power itself would overflow


def collisions(q: Tensor, k: Tensor, hash_length: int) -> Tensor:
    """Logarithm of the probability that random hyperplanes give a query and a key the same hash of that many bits.

    That is (1 - arccos(cos(q, k)) / π)^hash_length (YOSO, arXiv:2111.09714). As released, cosines are multiplied by
    0.98, which keeps the derivative finite.

    Args:
        q: queries [..., R, D], floating point.
        k: keys [..., N, D].
        hash_length: bits.

    Returns:
        [..., R, N], at most 0.
    """
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return hash_length * (1 - torch.acos(0.98 * cosines) / math.pi).log()


class NeuralScore(nn.Module):
    """Scores by an MLP of query and key, one for all heads (Neural Attention, arXiv:2502.17206).

    Args:
        head_dim: width D of a head.
        hidden_dim: channels p of the projections and of the first hidden layer; the second has half as many.

    The weight of `fc1` is taken apart: no other layer can take its place, as a quantized one.
    """

    def __init__(self, head_dim: int, hidden_dim: int):
        super().__init__()
        self.q_proj = nn.Linear(head_dim, hidden_dim)
        self.k_proj = nn.Linear(head_dim, hidden_dim)
        self.fc1 = nn.Linear(2 * hidden_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim // 2)
        self.fc3 = nn.Linear(hidden_dim // 2, 1)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Score queries [B, G, R, D] and keys [B, G, N, D], in their dtype."""
        weight = self.fc1.weight.to(q.dtype)
        q = linear(self.q_proj, q)[..., :, None, :]
        k = linear(self.k_proj, k)[..., None, :, :]
        # The first layer of a pair is the sum of that of the query and that of the key.
        of_q, of_k = weight.split(weight.shape[0], 1)
        hidden = F.linear(q, of_q, self.fc1.bias.to(q.dtype)) + F.linear(k, of_k)
        return linear(self.fc3, linear(self.fc2, hidden.relu()).relu()).squeeze(-1)


class ScoreConv(nn.Module):
    """Convolution of each head's scores over neighboring queries and keys of the map (MTA, arXiv:2504.00927).

    The authors' is over neighbors in a row of tokens: this is it on a map of one row. Beyond the map scores are 0. It
    starts as the identity.

    Args:
        num_heads: heads G.
        query_kernel: side of the square of queries.
        key_kernel: side of the square of keys.
        query_padding: "both" for a square around the query, "before" for one that ends in it.
        key_padding: the same for the keys, or "after" for one that starts at it.
    """

    PADDINGS = ("both", "before")
    KEY_PADDINGS = (*PADDINGS, "after")
    NO_WEIGHT_DECAY = ("weight",)

    def __init__(
        self,
        num_heads: int,
        query_kernel: int,
        key_kernel: int,
        *,
        query_padding: str = "both",
        key_padding: str = "both",
    ):
        super().__init__()
        self.query_kernel, self.key_kernel = query_kernel, key_kernel
        self.query_before, self.key_before = (
            {"both": kernel // 2, "before": kernel - 1, "after": 0}[padding]
            for kernel, padding in ((query_kernel, query_padding), (key_kernel, key_padding))
        )
        self.weight = nn.Parameter(torch.zeros(num_heads, query_kernel, query_kernel, key_kernel, key_kernel))
        with torch.no_grad():
            self.weight[:, self.query_before, self.query_before, self.key_before, self.key_before] = 1

    def halo(self, width: int) -> tuple[int, int]:
        """Return how many queries before and after its own the convolution sees, on a map of this width."""
        after = self.query_kernel - 1 - self.query_before
        return self.query_before * (width + 1), after * (width + 1)

    def over(self, rows: Rows, size: tuple[int, int]) -> Rows:
        """Return what gives the convolved scores of queries, of what gives the scores; the map is of this size."""

        def convolved(start: int, stop: int) -> Tensor:
            before, after = self.halo(size[1])
            low, high = max(start - before, 0), min(stop + after, size[0] * size[1])
            scores = rows(low, high)
            scores = F.pad(scores, (0, 0, low - start + before, stop + after - high))
            maps = scores.transpose(1, 2).unflatten(-1, size)  # [B, R, G, H, W]
            key_after = self.key_kernel - 1 - self.key_before
            maps = F.pad(maps, (self.key_before, key_after, self.key_before, key_after))
            at = torch.arange(start, stop, device=scores.device)
            y, x = at // size[1], at % size[1]
            out = None
            for row in range(self.query_kernel):
                for column in range(self.query_kernel):
                    dy, dx = row - self.query_before, column - self.query_before
                    seen = maps.narrow(1, before + dy * size[1] + dx, stop - start)
                    weight = self.weight[:, row, column, None].to(scores.dtype)
                    part = F.conv2d(seen.flatten(0, 1), weight, groups=weight.shape[0]).unflatten(0, seen.shape[:2])
                    on_map = (y + dy >= 0) & (y + dy < size[0]) & (x + dx >= 0) & (x + dx < size[1])
                    part = part * on_map.to(part.dtype)[:, None, None, None]
                    out = part if out is None else out + part
            assert out is not None
            return out.flatten(-2).transpose(1, 2)

        return convolved


class HeadMix(nn.Module):
    """Each head's scores become a weighted sum of those of its group's heads; it starts as the identity.

    Talking heads (arXiv:2003.02436) where all heads are one group.

    Args:
        num_heads: heads G.
        group_size: heads c of a group.
    """

    NO_WEIGHT_DECAY = ("weight",)

    def __init__(self, num_heads: int, group_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(group_size).repeat(num_heads // group_size, 1, 1))  # [G/c, from, to]

    def forward(self, scores: Tensor) -> Tensor:
        """[B, G, R, N] to [B, G, R, N]."""
        groups = scores.unflatten(1, self.weight.shape[:2])
        return torch.einsum("bgfrn,gft->bgtrn", groups, self.weight.to(scores.dtype)).flatten(1, 2)


class OffsetTable(nn.Module):
    """A learned number for each head and each offset from a query to a key on a map, all of one value at the start.

    Args:
        num_heads: heads G.
        map_size: side of the map that the table is for, or (height, width); for others it is resized, offset 0 staying.
        value: that they start from.
    """

    NO_WEIGHT_DECAY = ("table",)

    def __init__(self, num_heads: int, map_size: int | tuple[int, int], value: float):
        super().__init__()
        self.map_size: tuple[int, int] = to_2tuple(map_size)
        # offset (key - query) counted row by row from (1 - h, 1 - w)
        offsets = (2 * self.map_size[0] - 1) * (2 * self.map_size[1] - 1)
        self.table = nn.Parameter(torch.full((offsets, num_heads), value))

    def resized(self, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """[2H - 1, 2W - 1, G] for a map of (H, W) = `size`: that of offset (key - query) 0 is in the middle."""
        spans = [2 * side - 1 for side in self.map_size]
        table = self.table.to(dtype).unflatten(0, spans)[None]
        return resize_table(table, (2 * size[0] - 1, 2 * size[1] - 1), "bilinear")[0]

    def forward(self, size: tuple[int, int], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """[G, R, N] of the queries from `start` to before `stop` on a map of (height, width) = `size`."""
        table = self.resized(size, dtype).flatten(0, 1)
        keys = torch.arange(size[0] * size[1], device=table.device)
        queries = torch.arange(start, stop, device=table.device)[:, None]
        dy = keys // size[1] - queries // size[1] + size[0] - 1
        dx = keys % size[1] - queries % size[1] + size[1] - 1
        return table[dy * (2 * size[1] - 1) + dx].permute(2, 0, 1)


class GatedRmsNorm(nn.Module):
    """RMS norm whose gate is a sigmoid of the input times a weight (ReLA, arXiv:2104.07012).

    Args:
        dim: channels C.
    """

    EPS = 1e-8

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.gate = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C], in x's dtype."""
        scale = (x.square().mean(-1, keepdim=True) + self.EPS).rsqrt()
        return self.weight.to(x.dtype) * x * scale * (self.gate.to(x.dtype) * x).sigmoid()


class HeadRmsNorm(nn.Module):
    """RMS norm of each head's part of the channels, with one weight for all heads (MTA, arXiv:2504.00927).

    Args:
        head_dim: width D of a head.
        gated: multiply each head by the sigmoid of a learned sum of what the norm gives.
    """

    EPS = 1e-5

    def __init__(self, head_dim: int, gated: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.gate = nn.Linear(head_dim, 1) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C], in x's dtype."""
        heads = x.unflatten(-1, (-1, len(self.weight)))
        heads = F.rms_norm(heads, self.weight.shape, self.weight.to(x.dtype), self.EPS)
        if self.gate is not None:
            heads = heads * linear(self.gate, heads).sigmoid()
        return heads.flatten(-2)


class UnitHeads(nn.Module):
    """Bring each head's part of the channels to length 1; what is shorter than 1e-12 is divided by that.

    Args:
        num_heads: heads, each of channels in turn.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C], in x's dtype."""
        return F.normalize(x.unflatten(-1, (self.num_heads, -1)), dim=-1).flatten(-2)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer in the input's dtype; one that has taken the place of torch's own, as quantized ones, as it is."""
    if not isinstance(layer, nn.Linear):
        return layer(x)
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
