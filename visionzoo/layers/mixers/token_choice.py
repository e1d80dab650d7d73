"""Heads that attend among tokens that they choose: clusters by k-means, or the best by a router."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.attention import attend
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.outputs import add_term

OWN_SCORE = -5e4  # added to that of a token and itself where queries are the keys: seen only where nothing else is


class Centroids(nn.Module):
    """Centroids of unit vectors for each head, which follow the tokens in training (spherical k-means).

    The first training step starts from tokens taken at random and ten steps of k-means; each one moves the centroids
    towards the means of the tokens nearest to them, after they were used: μ ← d·μ + (1 - d)·mean / |mean|. Those that
    no token is nearest to stay. Among several processes each has its own tokens, and DDP spreads the first one's
    centroids; where activations are computed twice, the step is taken twice.

    Args:
        num_heads: heads G.
        num_clusters: centroids K of each.
        head_dim: width D.
        decay: d.
    """

    FIRST_STEPS = 10

    def __init__(self, num_heads: int, num_clusters: int, head_dim: int, decay: float):
        super().__init__()
        self.decay = decay
        self.started = False
        self.means: Tensor
        self.register_buffer("means", F.normalize(torch.randn(num_heads, num_clusters, head_dim), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, G, N, D] to their products with the centroids, [B, G, N, K], float32 at least, no gradient."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):
            unit = F.normalize(x.to(wide), dim=-1)
            if self.training and x.shape[0]:
                return self._learn(unit)
            return unit.detach() @ self.means.to(wide).mT

    def _learn(self, unit: Tensor) -> Tensor:
        fixed = unit.detach()
        if not self.started:
            self.started = True
            every = fixed.transpose(0, 1).flatten(1, 2)
            first = torch.randperm(every.shape[1], device=unit.device)
            means = every[:, first[torch.arange(self.means.shape[1], device=unit.device) % every.shape[1]]]
            for _ in range(self.FIRST_STEPS):
                means = self._step(fixed, fixed @ means.mT, means)
            self.means.copy_(means)
        means = self.means.to(unit.dtype, copy=True)
        products = fixed @ means.mT
        nearest = products.argmax(-1, keepdim=True)  # [B, G, N, 1]
        own = means.expand(len(unit), -1, -1, -1).gather(2, nearest.expand(-1, -1, -1, means.shape[-1]))
        add_term("commitment", F.mse_loss(unit, own))
        self.means.copy_(means.lerp(self._step(fixed, products, means), 1 - self.decay))
        return products

    @staticmethod
    def _step(unit: Tensor, products: Tensor, means: Tensor) -> Tensor:
        """Return the unit means [G, K, D] of the tokens that are nearest to each centroid."""
        clusters = torch.arange(means.shape[1], device=means.device)
        member = (products.argmax(-1, keepdim=True) == clusters).to(unit.dtype)  # [B, G, N, K]
        sums = (member.mT @ unit).sum(0)
        return torch.where(member.sum((0, 2))[..., None] > 0, F.normalize(sums, dim=-1), means)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.started = self.started or f"{prefix}means" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


class KMeansMixer(Mixer):
    """Attention within clusters of alike queries and keys (Routing Transformer, arXiv:2003.05997).

        yᵢ = Σ_{c: i ∈ Qc} Σ_{j ∈ Kc} softmaxⱼ(qᵢ·kⱼ / √D) vⱼ / (nᵢ + 10⁻⁵)

    Time: O(N·C·(C + K) + K·w²·C), with w = N/K O(N²·C/K); memory: O(K·w·C + N·G·K).

    Qc and Kc are the w queries and keys nearest in direction to centroid c of the head, so that clusters are of one
    size, N/K by default; nᵢ is the number of clusters that took query i, which may be none: then yᵢ is 0. √N clusters
    are cheapest. Routing and sums are float32 at least, the rest in the dtype of the input or of autocast. No gradient
    reaches the choice; centroids move in training (`Centroids`), and a model that collects terms gets `commitment`, the
    mean squared distance of unit queries and keys to their centroid.

    Facts from https://github.com/lucidrains/routing-transformer at 3f6c461 (MIT), `KmeansAttention` without causal
    masks. There the centroids start from tokens of any length and move on the backward pass; here from unit ones, on
    the forward pass.

    Args:
        dim: channels C.
        num_heads: attention heads G.
        num_clusters: K.
        window_size: w, queries and keys in a cluster, at most N; None for N/K, rounded up.
        shared_qk: keys are the queries at unit length, and a token sees itself only where there is no other.
        decay: of the centroids, from 0 to 1.
        qkv_bias: whether the projection to q, k, v has a bias.

    Raises:
        ValueError: if a number is not positive, or the decay is not from 0 to 1.

    >>> import torch
    >>> KMeansMixer(64, 2, num_clusters=4)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    AUXILIARY = {"commitment": 1e-4}

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        num_clusters: int = 8,
        window_size: int | None = None,
        shared_qk: bool = False,
        decay: float = 0.999,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        if num_clusters < 1 or (window_size is not None and window_size < 1):
            raise ValueError(
                f"KMeansMixer: num_clusters and window_size must be positive, got {num_clusters=} and {window_size=}"
            )
        if not 0 <= decay <= 1:
            raise ValueError(f"KMeansMixer: decay must be from 0 to 1, got {decay=}")
        self.num_clusters, self.window_size, self.shared_qk = num_clusters, window_size, shared_qk
        self.qkv = nn.Linear(dim, (2 if shared_qk else 3) * dim, bias=qkv_bias)
        self.centroids = Centroids(self.num_heads, num_clusters, self.head_dim, decay)
        self.proj = nn.Linear(dim, dim)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: places do not matter."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        q, *k, v = (
            self.qkv(x.flatten(1, 2)).unflatten(-1, (-1, self.num_heads, self.head_dim)).transpose(1, 3).unbind(2)
        )
        out = self._attend(q, *k, v)
        return self.proj(out.transpose(1, 2).flatten(2).view(x.shape))

    def _attend(self, q: Tensor, *kv: Tensor) -> Tensor:
        """Return what queries see, of queries, keys where they are others, and values [B, G, N, D], like them."""
        count, bias, wide = q.shape[2], None, torch.promote_types(q.dtype, torch.float32)
        window = -(-count // self.num_clusters) if self.window_size is None else min(self.window_size, count)
        if self.shared_qk:
            products = self.centroids(q)
            chosen = of_keys = _best(products, window)
            kv = (F.normalize(q.to(wide), dim=-1).to(q.dtype), *kv)
            bias = OWN_SCORE * torch.eye(window, dtype=q.dtype, device=q.device)
        else:
            products = self.centroids(torch.cat([q, kv[0]], 2))
            chosen, of_keys = (_best(some, window) for some in products.split(count, 2))
        some_q, some_k, some_v = (
            _take(t, at).flatten(1, 2) for t, at in zip((q, *kv), (chosen, of_keys, of_keys), strict=True)
        )
        seen = attend(some_q, some_k, some_v, bias=bias).unflatten(1, (self.num_heads, -1)).flatten(2, 3)
        index = chosen.flatten(2)
        taken = torch.zeros(q.shape[:3], dtype=wide, device=q.device).scatter_add(
            2, index, torch.ones_like(index, dtype=wide)
        )
        total = torch.zeros(q.shape, dtype=wide, device=q.device)
        total = total.scatter_add(2, index[..., None].expand(seen.shape), seen.to(wide))
        return (total / (taken + 1e-5)[..., None]).to(q.dtype)


class ExpertChoiceMixer(Mixer):
    """Each head attends among the tokens that it chooses (MoSA, arXiv:2505.00315).

        y = Σ_g Sᵍ(rᵍ ⊙ softmax(Qᵍ Kᵍᵀ / √D) Vᵍ) Oᵍ, head g chooses its k tokens by rᵍ

    Time: O(N·C²/s + N²·C/s²); memory: O(N·G·C/s).

    Head g takes the k = N/s tokens with the largest rᵍ = sigmoid(x·wᵍ), s being the sparsity, projects only these to
    Qᵍ, Kᵍ and Vᵍ, and adds what they see to their places (Sᵍ). Tokens that no head takes get 0. Routing and the sum
    over heads are float32 at least, the rest in the dtype of the input or of autocast.

    Facts from https://github.com/piotrpiekos/MoSA at f6dc4bc (MIT), `PureMoSA`; without its causal mask and rotary
    embedding of the place in the sequence, which are for text.

    Args:
        dim: channels C.
        num_heads: heads G, each of which chooses.
        sparsity: s, tokens over those that a head takes; it takes two at least, or all where there are fewer.
        head_dim: width D; None for dim / num_heads. Fewer channels or more heads than that are what sparsity pays for.
        include_first: every head takes the first token, a class token where there is one, whatever its score.

    Raises:
        ValueError: if the sparsity or the width is not positive, or the heads do not divide the channels that they
            share.

    >>> import torch
    >>> ExpertChoiceMixer(64, 4)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        sparsity: int = 4,
        head_dim: int | None = None,
        include_first: bool = False,
    ):
        super().__init__(dim, num_heads, head_dim=head_dim)
        if sparsity < 1 or self.head_dim < 1:
            raise ValueError(
                f"ExpertChoiceMixer: sparsity and head_dim must be positive, got {sparsity=} and {head_dim=}"
            )
        self.sparsity, self.include_first = sparsity, include_first
        self.router = nn.Linear(dim, self.num_heads, bias=False)
        self.qkv = nn.Parameter(torch.empty(self.num_heads, dim, 3 * self.head_dim))
        self.proj = nn.Parameter(torch.empty(self.num_heads, self.head_dim, dim))
        nn.init.uniform_(self.qkv, -(dim**-0.5), dim**-0.5)  # as layers of this width have it
        bound = math.sqrt(1 / (self.num_heads * self.head_dim))
        nn.init.uniform_(self.proj, -bound, bound)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: places do not matter."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        tokens = x.flatten(1, 2)
        wide = torch.promote_types(x.dtype, torch.float32)
        count = tokens.shape[1]
        scores = self.router(tokens).to(wide).transpose(1, 2)  # [B, G, N]
        wanted = min(count, max(2, count // self.sparsity))
        if self.include_first:
            index = F.pad(scores[..., 1:].topk(wanted - 1, -1).indices + 1, (1, 0))  # the first token is 0
            scores = scores.gather(-1, index)
        else:
            scores, index = scores.topk(wanted, -1)
        places = index.flatten(1)[..., None].expand(-1, -1, self.dim)
        chosen = tokens.gather(1, places).unflatten(1, index.shape[1:])  # [B, G, k, C]
        q, k, v = (chosen @ self.qkv).chunk(3, -1)
        seen = attend(q, k, v) * scores.sigmoid().to(q.dtype)[..., None]
        seen = seen @ self.proj  # [B, G, k, C]
        out = torch.zeros(tokens.shape, dtype=wide, device=x.device)
        out = out.scatter_add(1, places, seen.to(wide).flatten(1, 2))
        return out.to(seen.dtype).view(x.shape)


def _best(products: Tensor, count: int) -> Tensor:
    """Return the indices [B, G, K, w] of the tokens with the largest of [B, G, N, K]."""
    return products.topk(count, 2).indices.transpose(2, 3)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens [B, G, ..., C] by index [B, G, ...] of [B, G, N, C]."""
    return x.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])).unflatten(2, index.shape[2:])
