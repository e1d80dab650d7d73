"""The class stage of CaiT (arXiv:2103.17239) as GMM's authors have it: a class token that attends to the tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from visionzoo.layers.arguments import Positive
from visionzoo.layers.attention import attend
from visionzoo.layers.block import LayerScale
from visionzoo.layers.heads import TokenHead
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.part import Part


class ContextAttention(Part):
    """A class token attends to tokens beside it, with talking heads.

    Args:
        dim: channels C.
        num_heads: attention heads G.
        head_dim: their width D.
    """

    def __init__(self, dim: Positive, num_heads: Positive, head_dim: Positive):
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.kv = nn.Linear(dim, 2 * num_heads * head_dim, bias=False)
        self.talk_before, self.talk_after = (nn.Parameter(torch.randn(num_heads, num_heads)) for _ in range(2))
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def forward(self, token: Tensor, context: Tensor) -> Tensor:
        """[B, 1, C] and [B, N, C] to [B, 1, C]."""
        self.check_inputs("B 1 C, B N C", token, context, C=self.dim)
        q = self.q(token).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, talk=(self.talk_before, self.talk_after))
        return self.proj(out.transpose(1, 2).flatten(2))


class ContextBlock(Part):
    """Attention of a class token to tokens beside it, then an MLP of it, each with norm, learned scale and residual.

    Args:
        dim: channels C.
        num_heads: attention heads.
        head_dim: their width.
        mlp_ratio: hidden width of the MLP over C.
    """

    def __init__(self, dim: Positive, num_heads: Positive, head_dim: Positive, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.mixer = ContextAttention(dim, num_heads, head_dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = LayerScale(dim, 0.1), LayerScale(dim, 0.1)

    def forward(self, token: Tensor, context: Tensor) -> Tensor:
        """[B, 1, C] and [B, N, C] to [B, 1, C]."""
        self.check_inputs("B 1 C, B N C", token, context, C=self.mixer.dim)
        token = self.ls1(self.mixer(self.norm1(token), context), residual=token)
        return self.ls2(self.mlp(self.norm2(token)), residual=token)


class ContextHead(TokenHead):
    """Blocks in which a class token attends to the tokens, norm, linear classifier: the class stage of CaiT.

    Args:
        in_features: channels C.
        num_classes: classes; 0 for the normalized class token.
        pool_type: "class", or "" for the tokens as they came, with which there can be no classifier.
        drop_rate: dropout probability before the classifier.
        prefix_tokens: 0, because the tokens are only those of a map.
        depth: blocks.
        block: called with `in_features`.
    """

    POOLS = ("class", "")

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "class",
        drop_rate: float = 0.0,
        *,
        prefix_tokens: int = 0,
        depth: int,
        block: Callable[[int], nn.Module],
    ):
        super().__init__(
            in_features, num_classes, pool_type, drop_rate, prefix_tokens=prefix_tokens, norm_layer=LayerNorm
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, in_features))
        trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(block(in_features) for _ in range(depth))

    NO_WEIGHT_DECAY = ("cls_token",)

    def pool(self, x: Tensor) -> Tensor:
        """[B, N, C] to the normalized class token [B, C], or the tokens as they are where there is no pooling."""
        if not self.pool_type:
            return x
        token = self.cls_token.repeat(x.shape[0], 1, 1).to(x.dtype)
        for block in self.blocks:
            token = block(token, x)
        return self.norm(token[:, 0])
