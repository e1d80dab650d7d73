"""Forward cross attention: tokens of earlier blocks are further keys (FcaFormer, arXiv:2211.07198)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.layers.attention import attend
from visionzoo.layers.mixers.offset_bias import OffsetBiasMixer
from visionzoo.layers.norm import LayerNorm


class ForwardCrossMixer(OffsetBiasMixer):
    """Every token attends to every token, and to cross tokens from earlier blocks.

        yᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √D + b(j - i)) vⱼ over tokens and cross tokens

    Time: O(N²·C); memory: O(N²·G).

    Cross tokens are scaled, each by a learned factor, normalised, and projected to keys and values by the same layer as
    the map's tokens; both share one softmax. A bias for how far apart two tokens are is added to the scores, and one
    for each cross token. `visionzoo.models.fcaformer` makes the cross tokens; without them, as in the first block of
    its stages and alone, this is attention with biases for offsets. Softmax and sums are float32 at least; biases are
    added in the dtype of the queries.

    Facts from https://github.com/hkzhang-git/FcaFormer at 7dcd8e0 (no licence).

    Args:
        dim: channels C.
        num_heads: attention heads.
        map_size: side of the map that the table of biases is for, or (height, width); resized for maps without cross
            tokens of another size.
        cross_tokens: how many cross tokens there are.
        qkv_bias: whether the projection to q, k, v has a bias.

    Raises:
        ValueError: if the heads do not divide the channels, the map has no tokens, or the number is negative.

    >>> ForwardCrossMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        map_size: int | tuple[int, int] = 14,
        cross_tokens: int = 0,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads, map_size=map_size)
        if cross_tokens < 0:
            raise ValueError(f"ForwardCrossMixer: cross_tokens must not be negative, got {cross_tokens=}")
        self.cross_tokens = cross_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if cross_tokens:
            self.NO_WEIGHT_DECAY = (*self.NO_WEIGHT_DECAY, "cross_bias", "cross_scale")
            self.cross_scale = nn.Parameter(torch.ones(1, cross_tokens, 1))
            self.cross_norm = LayerNorm(dim)
            self.cross_bias = nn.Parameter(torch.zeros(1, self.num_heads, 1, cross_tokens))

    def forward(self, x: Tensor, cross: Tensor | None = None) -> Tensor:
        """[B, H, W, C] and cross tokens [B, `cross_tokens`, C], where there are any, to [B, H, W, C]."""
        self.check_input(x)
        given = 0 if cross is None else cross.shape[1]
        if given != self.cross_tokens:
            raise ValueError(f"ForwardCrossMixer: expected {self.cross_tokens} cross tokens, got {given}")
        tokens = x.flatten(1, 2)
        if cross is not None:
            tokens = torch.cat([tokens, self.cross_norm(cross * self.cross_scale)], 1)
        count = x.shape[1] * x.shape[2]
        q, k, v = (t.transpose(1, 2) for t in self.split_heads(self.qkv(tokens)))  # [B, G, N + M, D]
        bias = self.offset_bias((x.shape[1], x.shape[2]), q.dtype)[None]
        if cross is not None:
            cross_bias = self.cross_bias.to(q.dtype).expand(-1, -1, count, -1)
            bias = torch.cat([bias, cross_bias], 3)
        out = attend(q[:, :, :count], k, v, bias=bias)
        return self.proj(out.transpose(1, 2).reshape(x.shape))
