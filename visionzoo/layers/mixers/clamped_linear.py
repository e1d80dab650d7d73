"""Linear attention with a clamped denominator and a learned scale (L²ViT, arXiv:2501.16182)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.mixers.base import Mixer


class ClampedLinearMixer(Mixer):
    """Every token attends to every token by products of its positive features.

        yᵢ = s·φ(qᵢ)·(Σⱼ φ(kⱼ) vⱼᵀ) / max(φ(qᵢ)·Σⱼ φ(kⱼ), d), φ = relu

    Time: O(N·C·D); memory: O(N·C).

    With relu features φ the output is scale · φ(q)·(Σ φ(k) vᵀ) / max(φ(q)·(Σ φ(k)), `min_denominator`), the sums over
    all tokens. Features, sums and states are float32 at least, whatever the input.

    Facts from https://github.com/ChuanyangZheng/L2ViT at fad0341 (MIT).

    Args:
        dim: channels C.
        num_heads: attention heads.
        min_denominator: positive; keeps training stable where few keys have a feature of the query's.
        qkv_bias: whether the projection to q, k, v has a bias.

    Raises:
        ValueError: if the denominator is not positive.

    >>> import torch
    >>> ClampedLinearMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self, dim: int, num_heads: int | None = None, *, min_denominator: float = 100.0, qkv_bias: bool = True
    ):
        super().__init__(dim, num_heads)
        if min_denominator <= 0:
            raise ValueError(f"ClampedLinearMixer: min_denominator must be positive, got {min_denominator=}")
        self.min_denominator = min_denominator
        self.temperature = nn.Parameter(torch.full((self.num_heads, 1, 1), self.head_dim**-0.5))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        qkv = self.qkv(x)
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        with without_autocast(x.device):
            # [B, H, W, G, D] -> [B, G, N, D]
            q, k, v = (t.flatten(1, 2).transpose(1, 2).to(dtype) for t in self.split_heads(qkv))
            q, k = q.relu(), k.relu()
            denominator = (q @ k.sum(2).unsqueeze(-1)).clamp(min=self.min_denominator)
            out = q @ (k.mT @ v * self.temperature) / denominator
        return self.proj(out.transpose(1, 2).reshape(x.shape).to(qkv.dtype))
