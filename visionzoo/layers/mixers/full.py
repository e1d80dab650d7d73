"""Global self-attention with a local enhancement of positions (last stage of BiFormer, arXiv:2303.08810)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.layers.attention import attention_received, attention_weights, hide
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.outputs import add_term, collecting


class FullMixer(Mixer):
    """Every token attends to every token; softmax in float32 at least.

        yᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √D) vⱼ

    Time: O(N²·C); memory: O(N·C).

    Facts from https://github.com/rayleizhu/BiFormer at 1697bbb (MIT).

    Args:
        dim: channels C.
        num_heads: attention heads.
        qkv_bias: whether the projection to q, k, v has a bias.
        lepe_kernel: kernel of a depthwise convolution of the mixer's input, added before the output projection
            (locally enhanced position encoding); odd, or None for none.
        head_dim: width D of a head; None means C / num_heads.
        kv_heads: heads of keys and values (grouped queries, arXiv:2305.13245; one head of them: arXiv:1911.02150), see
            `Mixer`; `mean_pooled_heads` turns the weights of num_heads into theirs.
        sparse_term: add to the loss the term "sparsity", the mean of log(1 + a²) over attention's weights a, all of
            which are held for it (Sparse then Prune, arXiv:2307.11988; its weight is that of
            https://github.com/yogiprsty/Sparse-ViT at 63a3401, where only the term of the last block counts).

    Raises:
        ValueError: if the heads do not divide the channels, kv_heads do not divide the heads, the kernel is even, or
            head_dim is not positive or makes the heads wider or narrower than the map beside a convolution.

    >>> import torch
    >>> FullMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    SCORE_MAP = True
    SCORES = Mixer.SCORE_KINDS
    RELAXES = SUBSAMPLES = QUANTIZES = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        qkv_bias: bool = False,
        lepe_kernel: int | None = None,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        sparse_term: bool = False,
    ):
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"{type(self).__name__}: head_dim must be positive, got {head_dim=}")
        super().__init__(dim, num_heads, head_dim=head_dim, kv_heads=kv_heads)
        self.check_kernels(lepe_kernel=lepe_kernel)
        inner_dim = self.num_heads * self.head_dim
        if lepe_kernel and inner_dim != dim:
            raise ValueError(
                f"{type(self).__name__}: lepe_kernel needs heads that are together as wide as the map, got {dim=}, "
                f"num_heads={self.num_heads} and {head_dim=}; pass head_dim=None or lepe_kernel=None"
            )
        self.qkv = nn.Linear(dim, self.qkv_dim, bias=qkv_bias)
        self.lepe = DepthwiseConvNHWC(dim, lepe_kernel) if lepe_kernel else None
        self.proj = nn.Linear(inner_dim, dim)
        self.AUXILIARY = {"sparsity": 0.01} if sparse_term else {}

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes, but for the convolution of positions, which needs a map."""
        return self.lepe is None

    @property
    def takes_dropped_tokens(self) -> bool:
        """As it takes prefix tokens."""
        return self.takes_prefix_tokens

    def forward(self, x: Tensor, *, keep: Tensor | None = None, score: str = "") -> Tensor | tuple[Tensor, Tensor]:
        """[B, H, W, C] to [B, H, W, C]; with `score` also the scores of the tokens, [B, N].

        Args:
            x: map.
            keep: tokens that others see, [B, N]; None for all.
            score: "class_attention" for what the first token gives to each, "received_attention" for the mean of what
                all give to it, means over the heads; "" for no scores.
        """
        self.check_input(x)
        q, k, v = self._heads_first(x.flatten(1, 2))
        hidden = hide(keep, q.dtype)
        if self.AUXILIARY and self.training and collecting():
            add_term("sparsity", attention_weights(q, k, hidden).square().log1p().mean())
        out = self.attend(q, k, v, bias=hidden).transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])
        if self.lepe is not None:
            out = self.lepe(x, residual=out)
        out = self.proj(out)
        if not score:
            return out
        return out, attention_received(q[:, :, :1] if score == "class_attention" else q, k, hidden)

    def mix_first(self, x: Tensor, **beside: Any) -> Tensor:
        """Return the output [B, 1, C] for the first of tokens [B, N, C]; the others are only keys and values."""
        q, k, v = self._heads_first(x)
        return self.proj(self.attend(q[:, :, :1], k, v).transpose(1, 2).flatten(2))

    def _heads_first(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project [B, N, C] to q, k and v, each [B, G, N, D]."""
        q, k, v = (t.transpose(1, 2) for t in self.split_heads(self.qkv(x)))
        return q, k, v


def mean_pooled_heads(weight: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    """Turn the projection to q, k, v of `num_heads` each into one with `kv_heads` of keys and values: means of heads.

    Keys and values that share a group of queries give their mean, as in the conversion of arXiv:2305.13245.

    Args:
        weight: `qkv.weight` [3·C, C] or `qkv.bias` [3·C] of a FullMixer, or of any layer laid out (q, k, v) x heads.
        num_heads: heads of each.
        kv_heads: heads of keys and values to return.

    Returns:
        [C + 2·kv_heads·D, ...] with D = C / num_heads.

    Raises:
        ValueError: if kv_heads do not divide num_heads, or these the rows.
    """
    if kv_heads < 1 or num_heads < 1 or num_heads % kv_heads or weight.shape[0] % (3 * num_heads):
        raise ValueError(
            f"expected kv_heads that divide num_heads, and 3 * num_heads that divide the rows, got {num_heads=}, "
            f"{kv_heads=} and a weight of {tuple(weight.shape)}"
        )
    q, *shared = weight.chunk(3)
    pooled = [t.unflatten(0, (kv_heads, num_heads // kv_heads, -1)).mean(1).flatten(0, 1) for t in shared]
    return torch.cat([q, *pooled])
