"""Attention without embeddings of queries, keys and values (EFT of EDAFormer, arXiv:2407.17261)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_size


class EmbeddingFreeMixer(Mixer):
    """Tokens are their own queries; keys are values too, one for each patch of r×r tokens.

        yᵢ = Σⱼ softmaxⱼ(xᵢ·kⱼ / √D) kⱼ, k the means of r × r patches after one layer

    Time: O(N·C² + N²·C/r²); memory: O(N·C).

    Keys and values are the means of the patches after one linear layer. The rows and columns after the last whole patch
    have no part in them, as released; a map smaller than a patch is padded with zeros to one. Softmax is float32 at
    least.

    Facts from https://github.com/hyunwoo137/EDAFormer at 9f98d76 (Apache-2.0).

    Args:
        dim: channels C.
        num_heads: attention heads.
        reduction: side r of the patches; 1 for every token.
        isr: inference spatial reduction: in eval mode r is this many times larger, which costs less and needs no
            training.
        key_norm: have a layer norm and a GELU after that layer, as in EDAFormer's decoder.

    Raises:
        ValueError: if a number is not positive.

    >>> import torch
    >>> EmbeddingFreeMixer(64, 2, reduction=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    RELAXES = SUBSAMPLES = True

    def __init__(
        self, dim: int, num_heads: int | None = None, *, reduction: int = 1, isr: int = 1, key_norm: bool = False
    ):
        super().__init__(dim, num_heads)
        if reduction < 1 or isr < 1:
            raise ValueError(f"EmbeddingFreeMixer: reduction and isr must be positive, got {reduction=} and {isr=}")
        self.reduction = reduction
        self.isr = isr
        self.kv = nn.Linear(dim, dim)
        self.kv_norm = LayerNorm(dim) if key_norm else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        side = self.reduction if self.training else self.reduction * self.isr
        means = x
        if side > 1:
            means = F.avg_pool2d(pad_to_size(x, (side, side)).permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
        heads = (self.num_heads, self.head_dim)
        keys = self.kv(means) if self.kv_norm is None else F.gelu(self.kv_norm(self.kv(means)))
        q, kv = (t.unflatten(-1, heads).flatten(1, 2).transpose(1, 2) for t in (x, keys))  # [B, G, N, D]
        out = self.attend(q, kv, kv)
        return self.proj(out.transpose(1, 2).reshape(x.shape))
