"""Sparse attention along an estimate of the full one (SEA, arXiv:2310.01777)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels import linear_attention
from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.attention import attention_weights
from visionzoo.layers.features import Favor
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.mixers.score import in_portions
from visionzoo.layers.outputs import add_term, collecting


class SeaMixer(Mixer):
    """Each token attends to the tokens for which a small network, after linear attention, expects large weights.

        yᵢ = σ(bᵢ)·σ(aᵢ)·Σ_{j ∈ S(i)} softmaxⱼ(qᵢ·kⱼ / √D) vⱼ + (1 - σ(bᵢ))·Σⱼ p̄ⱼ vⱼ

    Time: O(N²·C + N·L·G·(D + G)) for L = `length`; memory: O(N·L·G), with about 2²⁶ weights at once.

    Tokens are one sequence, row by row. FAVOR+ (`visionzoo.layers.features.Favor`) of the values and of coordinates
    along the sequence, with the values themselves, is encoded; from that, a layer and three convolutions over (queries,
    cells) make pᵢ, an estimate of attention over `length` cells, stretches of tokens that follow each other. S(i) are
    the tokens of the largest cells, about `topk` tokens for each head; p̄ is the mean of the estimates, each token with
    the number of its cell. aᵢ and bᵢ are a layer of the encoding.

    The authors' CUDA kernels visit S(i) alone; here the weights of all pairs are computed and hidden, in portions that
    are computed once more in the backward pass. Features, softmaxes and sums are float32 at least, the layers of the
    network have the dtype of the input or of autocast.

    No gradient passes through the choice. The network learns from p̄, from a and b, and from the term "estimation" in
    the loss of models that collect terms: 0.1·KL + squared error of the estimate for this mixer's own attention, which
    holds all N² weights. The authors have a trained model's attention in its place, and this one's as an option.

    Lee et al., ICLR 2024. Facts from https://github.com/gmlwns2000/sea-attention at 5609413 (no licence, so only facts
    are taken), `PerlinAttention` without causal mask, with predictor "mlp" and backend "performer". Left out: its
    causal form, the predictor "comp", `k_oversample`, adapters (LoRA) of the projections. Its code divides scores by
    √D only where a teacher is given: here they always are.

    Args:
        dim: channels C.
        num_heads: attention heads G.
        length: cells of an estimate, even.
        topk: tokens that a query sees, for each head, on average.
        among: what the largest cells are chosen from: those of a query and head ("query"), of a query ("heads", the
            paper's), of a head ("queries") or of an image ("sample"); one at least in each.
        num_features: of FAVOR+; None for D·log(D), at least 1.
        shared_encoder: encode each head by the same layer; otherwise all heads by one.
        scale_weights: whether there is a.
        qkv_bias: whether the projection to q, k, v has a bias.

    Raises:
        ValueError: if the heads do not divide the channels, a name is unknown or a number out of its range.

    >>> import torch
    >>> SeaMixer(64, 2, length=8)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    AMONG = ("query", "heads", "queries", "sample")
    AUXILIARY = {"estimation": 1.0}
    PLANES = 4  # of a head, in the convolutions

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        length: int = 128,
        topk: int = 7,
        among: str = "heads",
        num_features: int | None = None,
        shared_encoder: bool = True,
        scale_weights: bool = True,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        if among not in self.AMONG:
            raise ValueError(f"SeaMixer: unknown {among=}, expected one of {self.AMONG}")
        if length < 2 or length % 2 or topk < 1 or (num_features is not None and num_features < 1):
            raise ValueError(
                f"SeaMixer: length must be even and positive, topk and num_features positive, got {length=}, {topk=} "
                f"and {num_features=}"
            )
        self.length, self.topk, self.among = length, topk, among
        self.shared_encoder, self.scale_weights = shared_encoder, scale_weights
        width, heads, planes = self.head_dim, self.num_heads, self.PLANES * self.num_heads
        count = max(1, int(width * math.log(width))) if num_features is None else num_features
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.features = Favor(width, count)
        joined = 1 if shared_encoder else heads
        self.encode = nn.Sequential(
            nn.Linear(3 * width * joined, 2 * width * joined), nn.LayerNorm(2 * width * joined), nn.GELU()
        )
        self.to_planes = nn.Linear(2 * width, self.PLANES * length // 2)
        self.reduce = nn.Conv2d(planes, planes, 3, stride=(2, 1), padding=1)
        self.mix = nn.Conv2d(planes, planes, 3, padding=1)
        self.estimate = nn.Conv2d(planes, heads, 3, padding=1)
        self.scales = nn.Linear(2 * width, 2)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        # [B, H, W, G, D] -> [B, G, N, D]
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in self.split_heads(self.qkv(x)))
        given, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
        with without_autocast(x.device):
            q, k, v = (t.to(dtype) for t in (q, k, v))
            context = self._linear_attention(q, k, torch.cat([_coordinates(v), v], -1))
            described = torch.cat([context, v], -1).to(given)
        code = self._encoded(described)
        scores = self._estimated(code)  # [B, G, N, length]
        seen = self.scales(code).to(dtype).sigmoid()
        with without_autocast(x.device):
            scores = scores.to(dtype)
            shares = scores.softmax(-1)
            cells = _cells(v.shape[2], self.length, x.device)
            if self.training and collecting():
                add_term("estimation", _distance(scores[..., cells], attention_weights(q, k).detach()))
            out = self._attend(q * self.head_dim**-0.5, k, v, self._largest(shares.detach()), cells)
            if self.scale_weights:
                out = out * seen[..., :1]
            mean = shares.mean(2)[..., None, cells] @ v  # [B, G, 1, D]
            out = out * seen[..., 1:] + (1 - seen[..., 1:]) * mean
        return self.proj(out.transpose(1, 2).flatten(2).to(given)).view(x.shape)

    def _linear_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, N, G, D]
        q, k = self.features(q, k, (1, k.shape[1]), None)
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        return linear_attention(q, k, v, feature_map="identity", eps=0.0).squeeze(1).transpose(1, 2)

    def _encoded(self, x: Tensor) -> Tensor:
        """[B, G, N, 3·D] to [B, G, N, 2·D]."""
        if self.shared_encoder:
            return self.encode(x)
        return self.encode(x.transpose(1, 2).flatten(2)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _estimated(self, code: Tensor) -> Tensor:
        """Return scores of all cells [B, G, N, length], of codes [B, G, N, 2·D]."""
        count = code.shape[2]
        # [B, G, N, planes · length/2] -> [B, G · planes, N, length/2]
        planes = self.to_planes(code).unflatten(-1, (self.PLANES, -1)).transpose(2, 3).flatten(1, 2)
        hidden = self.mix(self.reduce(planes).relu()).relu().repeat_interleave(2, 2)
        scores = self.estimate(hidden)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return F.interpolate(wide, (count, self.length), mode="bilinear")

    def _largest(self, shares: Tensor) -> Tensor:
        """Say which cells are seen, [B, G, N, length]."""
        batch, heads, count, length = shares.shape
        ranked, groups = {
            "query": (shares, 1),
            "heads": (shares.transpose(1, 2).flatten(2), heads),
            "queries": (shares.flatten(2), count),
            "sample": (shares.flatten(1), heads * count),
        }[self.among]
        number = min(max(1, _rounded(groups * self.topk * length, count)), ranked.shape[-1])
        seen = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, ranked.topk(number).indices, True)
        if self.among == "heads":
            return seen.unflatten(2, (heads, length)).transpose(1, 2)
        return seen.view(batch, heads, count, length)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, cells: Tensor) -> Tensor:
        """Return what queries see in the cells that they see, 0 where there is none."""

        def rows(start: int, stop: int) -> Tensor:
            hidden = ~seen[:, :, start:stop, cells]
            scores = (q[:, :, start:stop] @ k.mT).masked_fill(hidden, torch.finfo(q.dtype).min)
            return scores.softmax(-1).masked_fill(hidden, 0) @ v

        return in_portions(rows, q, held=2)


def _coordinates(v: Tensor) -> Tensor:
    """Return places along the sequence as weights of the two nearest of D points on it, [B, G, N, D]."""
    count, width = v.shape[2:]
    place = torch.arange(count, device=v.device, dtype=v.dtype) / (count - 1 + 1e-8) * (width - 1)
    points = torch.arange(width, device=v.device, dtype=v.dtype)
    return (1 - (place[:, None] - points).abs()).relu().expand_as(v)


def _cells(count: int, length: int, device: torch.device) -> Tensor:
    """Return the cell of each of N tokens; edges belong to the cell before."""
    centres = (torch.arange(count, device=device, dtype=torch.float64) + 0.5) / count * length
    return (centres - 1e-4).floor().clamp(min=0).long()


def _rounded(number: int, by: int) -> int:
    """Return number / by, rounded to the nearest integer, halves to the even one."""
    rounded = (2 * number + by) // (2 * by)
    return rounded - 1 if (2 * number + by) % (2 * by) == 0 and rounded % 2 else rounded


def _distance(scores: Tensor, weights: Tensor) -> Tensor:
    """Return 0.1·KL + mean squared error of the softmax of scores for weights, both [B, G, N, N]."""
    logs = scores.log_softmax(-1)
    divergence = (weights * ((weights + 1e-12).log() - logs)).sum() / (len(weights) * weights.shape[2])
    return 0.1 * divergence + F.mse_loss(logs.exp(), weights)
