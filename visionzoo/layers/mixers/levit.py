"""Attention with learned biases for offsets (LeViT, arXiv:2104.01136)."""

from __future__ import annotations

from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.layers.conv_norm import LinearNorm
from visionzoo.layers.mixers.offset_bias import OffsetBiasMixer


class LevitMixer(OffsetBiasMixer):
    """Every token attends to every token, with a bias for how far apart they are.

        yᵢ = BN(W·act(Σⱼ softmaxⱼ(qᵢ·kⱼ / √D + b(|j - i|)) vⱼ))

    Time: O(N²·C); memory: O(N²·G).

    Each linear layer is followed by batch normalization, and an activation comes before the output projection, so a
    block needs no norm of its own. Queries and keys are narrower than values. Softmax and sums are float32 at least;
    the bias is added in the dtype of the queries.

    The table of biases holds one value for each head and |Δy|, |Δx| on a map of `map_size`. For a map of another size
    it is resized linearly, the largest offset of the one map being that of the other.

    Facts from https://github.com/facebookresearch/LeViT at 3772b8e (Apache-2.0).

    Args:
        dim: channels C.
        num_heads: attention heads; they need not divide `dim`.
        key_dim: width of a head's queries and keys.
        attn_ratio: width of a head's values over `key_dim`.
        map_size: side of the map that the table is for, or (height, width); 14 at 224 px and stride 16.
        stride: take every stride-th row and column of the map for queries, which shrinks the map. Other than 1 only
            in place of downsampling.
        out_dim: channels of the output; None means `dim`.
        act_layer: activation before the output projection.
        zero_init: start the norm after the output projection at 0, so that a residual branch starts as nothing.

    Raises:
        ValueError: if a width, size or stride is not positive.

    >>> import torch
    >>> LevitMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    SCORE_MAP = True
    RELAXES = SUBSAMPLES = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        key_dim: int = 16,
        attn_ratio: float = 2.0,
        map_size: int | tuple[int, int] = 14,
        stride: int = 1,
        out_dim: int | None = None,
        act_layer: type[nn.Module] = nn.Hardswish,
        zero_init: bool = False,
    ):
        head_dim = int(key_dim * attn_ratio)
        if min(key_dim, head_dim, stride, 1 if out_dim is None else out_dim, *to_2tuple(map_size)) < 1:
            raise ValueError(
                f"LevitMixer: key_dim, key_dim·attn_ratio, map_size, stride and out_dim must be positive, "
                f"got {key_dim=}, {attn_ratio=}, {map_size=}, {stride=} and {out_dim=}"
            )
        super().__init__(dim, num_heads, head_dim=head_dim, map_size=map_size, stride=stride)
        self.key_dim = key_dim
        self.out_dim = dim if out_dim is None else out_dim
        if stride == 1:
            self.qkv = LinearNorm(dim, self.num_heads * (2 * key_dim + self.head_dim))
        else:
            self.q = LinearNorm(dim, self.num_heads * key_dim)
            self.kv = LinearNorm(dim, self.num_heads * (key_dim + self.head_dim))
        self.act = act_layer()
        self.proj = LinearNorm(self.num_heads * self.head_dim, self.out_dim, norm_weight=0.0 if zero_init else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, ⌈H / stride⌉, ⌈W / stride⌉, out_dim]."""
        self.check_input(x)
        heads = (self.num_heads, -1)
        if self.stride == 1:
            size = x.shape[1:3]
            q, k, v = self.qkv(x).unflatten(-1, heads).split([self.key_dim, self.key_dim, self.head_dim], dim=-1)
        else:
            queries = x[:, :: self.stride, :: self.stride]
            size = queries.shape[1:3]
            q = self.q(queries).unflatten(-1, heads)
            k, v = self.kv(x).unflatten(-1, heads).split([self.key_dim, self.head_dim], dim=-1)
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # [B, G, N, D]
        bias = self.offset_bias((x.shape[1], x.shape[2]), q.dtype)
        out = self.attend(q, k, v, bias=bias[None], scale=self.key_dim**-0.5)
        return self.proj(self.act(out.transpose(1, 2).flatten(2).unflatten(1, size)))
