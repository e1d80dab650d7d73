"""Global self-attention with a local enhancement of positions (last stage of BiFormer, arXiv:2303.08810)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from visionzoo.layers.attention import attend, attention_received, attention_weights, hide
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.outputs import add_term, collecting


class FullMixer(Mixer):
    """Every token attends to every token; O(N²·C), softmax in float32 at least.

    Args:
        dim: channels C.
        num_heads: attention heads.
        qkv_bias: whether the projection to q, k, v has a bias.
        lepe_kernel: kernel of a depthwise convolution of the mixer's input, added before the output projection
            (locally enhanced position encoding); odd, or None for none.
        sparse_term: add to the loss the term "sparsity", the mean of log(1 + a²) over attention's weights a, all of
            which are held for it (Sparse then Prune, arXiv:2307.11988; its weight is that of
            https://github.com/yogiprsty/Sparse-ViT at 63a3401, where the term of the last block alone counts).

    Raises:
        ValueError: if the heads do not divide the channels, or the kernel is even.

    >>> import torch
    >>> FullMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    SCORES = Mixer.SCORE_KINDS

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        qkv_bias: bool = False,
        lepe_kernel: int | None = None,
        sparse_term: bool = False,
    ):
        super().__init__(dim, num_heads)
        self.check_kernels(lepe_kernel=lepe_kernel)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = DepthwiseConvNHWC(dim, lepe_kernel) if lepe_kernel else None
        self.proj = nn.Linear(dim, dim)
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
        # [B, H, W, G, D] -> [B, G, N, D]
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in self.split_heads(self.qkv(x)))
        hidden = hide(keep, q.dtype)
        if self.AUXILIARY and self.training and collecting():
            add_term("sparsity", attention_weights(q, k, hidden).square().log1p().mean())
        out = attend(q, k, v, bias=hidden).transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            out = self.lepe(x, residual=out)
        out = self.proj(out)
        if not score:
            return out
        return out, attention_received(q[:, :, :1] if score == "class_attention" else q, k, hidden)

    def mix_first(self, x: Tensor, **beside: Any) -> Tensor:
        """Return the output [B, 1, C] for the first of tokens [B, N, C]; the others are keys and values alone."""
        # [B, N, 3, G, D] -> [B, G, N, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).transpose(1, 3).unbind(2)
        return self.proj(attend(q[:, :, :1], k, v).transpose(1, 2).flatten(2))
