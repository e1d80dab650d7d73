"""Gated positional self-attention (ConViT, arXiv:2103.10697)."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from visionzoo.layers.attention import record_weights
from visionzoo.layers.mixers.base import Mixer


class GatedPositionalMixer(Mixer):
    """Attention to contents and attention to relative positions, mixed by a learned gate for each head.

        yᵢ = Σⱼ [(1 - σ(λ)) softmaxⱼ(qᵢ·kⱼ) + σ(λ) softmaxⱼ(w·r(j - i))] vⱼ

    Time: O(N²·C); memory: O(N²·G).

    Heads start as a convolution of k×k: each looks at one of k² offsets, where k² is the number of heads or the next
    smaller square, and values are passed on as they are. Softmax is float32 at least.

    Facts from https://github.com/facebookresearch/convit at 0a9340a (Apache-2.0).

    Args:
        dim: channels C.
        num_heads: attention heads.
        qkv_bias: whether the projections to q, k and to v have a bias.
        locality_strength: how sharply the positions are attended to at the start.

    Raises:
        ValueError: if the heads do not divide the channels.

    >>> import torch
    >>> GatedPositionalMixer(64, 4)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    SCORE_MAP = True

    def __init__(
        self, dim: int, num_heads: int | None = None, *, qkv_bias: bool = False, locality_strength: float = 1.0
    ):
        super().__init__(dim, num_heads)
        self.locality_strength = locality_strength
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.pos_proj = nn.Linear(3, self.num_heads)
        self.gate = nn.Parameter(torch.ones(self.num_heads))
        self.proj = nn.Linear(dim, dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start as a convolution."""
        nn.init.eye_(self.v.weight)
        side = isqrt(self.num_heads)
        head = torch.arange(side * side)
        center = (side - 1) / 2 if side % 2 == 0 else side // 2  # as released
        weight = torch.zeros(self.num_heads, 3)
        weight[: side * side, 0] = 2 * (head // side - center)
        weight[: side * side, 1] = 2 * (head % side - center)
        weight[: side * side, 2] = -1
        self.pos_proj.weight.copy_(weight * self.locality_strength)

    @property
    def pair_bytes(self) -> int:
        """Weights by contents and by positions."""
        return 8 * self.num_heads

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        heads = (self.num_heads, self.head_dim)
        q, k = self.qk(x).unflatten(-1, (2, *heads)).flatten(1, 2).permute(2, 0, 3, 1, 4)  # [B, G, N, D]
        v = self.v(x).unflatten(-1, heads).flatten(1, 2).transpose(1, 2)
        wide = torch.promote_types(q.dtype, torch.float32)
        content = (q.to(wide) @ k.to(wide).transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        gate = self.gate.to(wide).sigmoid()[:, None, None]
        scores = (1 - gate) * content + gate * self._positions(x).to(wide).softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True)
        record_weights(scores)
        out = scores.to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def _positions(self, x: Tensor) -> Tensor:
        """Scores [G, N, N] of relative positions: key minus query, in tokens."""
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, columns = (torch.arange(size, device=x.device, dtype=wide) for size in x.shape[1:3])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        dy, dx = (grid[None] - grid[:, None]).unbind(-1)
        return self.pos_proj(torch.stack([dx, dy, dx**2 + dy**2], -1).to(x.dtype)).permute(2, 0, 1)
