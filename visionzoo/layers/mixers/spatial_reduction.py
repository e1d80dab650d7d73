"""Spatial-reduction attention (PVT, arXiv:2102.12122; pooled to a fixed size in PVTv2-Linear, arXiv:2106.13797)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.layers.attention import hide
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_size


class SpatialReductionMixer(Mixer):
    """Every token attends to a smaller map: one key for each patch of r×r tokens.

        yᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √D) vⱼ over one key for each r × r patch

    Time: O(N²·C/r²), pooled O(N·s²·C); memory: O(N·C).

    The rows and columns after the last whole patch have no part in the keys, as released; a map smaller than a patch is
    padded with zeros to one. Softmax is float32 at least.

    Facts from https://github.com/whai362/PVT at 57e2dfa (Apache-2.0).

    Args:
        dim: channels C.
        num_heads: attention heads.
        reduction: side r of the patches, which a convolution and a norm turn into a token each; 1 for every token.
        pool_size: side s of the map that average pooling, instead of the patches, reduces any map to (7 in
            PVTv2-Linear); None for patches.
        qkv_bias: whether the projections to q and to k, v have a bias.
        kv_heads: heads of keys and values, see `Mixer`.

    Raises:
        ValueError: if a size is not positive, or both are given.

    >>> import torch
    >>> SpatialReductionMixer(64, 2, reduction=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    RELAXES = SUBSAMPLES = QUANTIZES = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        reduction: int = 1,
        pool_size: int | None = None,
        qkv_bias: bool = True,
        kv_heads: int | None = None,
    ):
        super().__init__(dim, num_heads, kv_heads=kv_heads)
        if reduction < 1 or (pool_size is not None and pool_size < 1) or (pool_size is not None and reduction > 1):
            raise ValueError(
                f"SpatialReductionMixer: expected a positive reduction, or a positive pool_size with reduction 1, got "
                f"{reduction=} and {pool_size=}"
            )
        self.reduction = reduction
        self.pool_size = pool_size
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.sr = ConvNorm(dim, dim, reduction, reduction, norm_layer=LayerNorm) if pool_size or reduction > 1 else None
        self.kv = nn.Linear(dim, 2 * self.kv_heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes, where keys are not reduced, which needs a map."""
        return self.sr is None

    @property
    def takes_dropped_tokens(self) -> bool:
        """As it takes prefix tokens."""
        return self.takes_prefix_tokens

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; `keep` [B, N] is False for tokens that others do not see."""
        self.check_input(x)
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).flatten(1, 2).transpose(1, 2)  # [B, G, N, D]
        kv = self.kv(self._reduce(x)).unflatten(-1, (2, self.kv_heads, -1)).flatten(1, 2)  # [B, N', 2, kv_heads, D]
        k, v = self.repeat_heads(kv).transpose(1, 3).unbind(2)  # [B, G, N', D]
        out = self.attend(q, k, v, bias=hide(keep, q.dtype))
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))

    def _reduce(self, x: Tensor) -> Tensor:
        if self.sr is None:
            return x
        if self.pool_size is not None:
            x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.pool_size).permute(0, 2, 3, 1)
            return F.gelu(self.sr(x))
        return self.sr(pad_to_size(x, (self.reduction, self.reduction)))
