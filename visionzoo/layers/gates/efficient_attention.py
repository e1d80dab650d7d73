"""Efficient Attention's module (Shen et al., arXiv:1812.01243): linear attention with its projections and residual.

Facts from efficient_attention.py of https://github.com/cmsflash/efficient-attention at 46a5f9e (MIT license); the code
here is our own. `LinearMixer(feature_map="softmax")` is the same attention as a mixer, without the residual.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.gates.base import Gate, softmax_over_positions


class EfficientAttentionGate(Gate):
    """Add what every position reads from a summary of the map; O(N·C·(K + V) + N·K·V / heads).

    Keys have a softmax over the positions, queries over the channels of their head; there is no scale. Softmaxes and
    the summaries are float32 at least, the rest has the dtype of the input or of autocast.

    Args:
        dim: channels C.
        key_dim: channels K of keys and queries, all heads together; None means `dim`.
        value_dim: channels V of values, all heads together; None means `dim`.
        num_heads: heads; they divide `key_dim` and `value_dim`. The paper has one, the repository any number.

    Raises:
        ValueError: if the heads do not divide the channels.

    >>> import torch
    >>> EfficientAttentionGate(64, num_heads=8)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, *, key_dim: int | None = None, value_dim: int | None = None, num_heads: int = 1):
        super().__init__(dim)
        key_dim = dim if key_dim is None else key_dim
        value_dim = dim if value_dim is None else value_dim
        self.check_positive(key_dim=key_dim, value_dim=value_dim)
        self.check_divides(key_dim, "key_dim", num_heads=num_heads)
        self.check_divides(value_dim, "value_dim", num_heads=num_heads)
        self.num_heads = num_heads
        self.k = nn.Linear(dim, key_dim)
        self.q = nn.Linear(dim, key_dim)
        self.v = nn.Linear(dim, value_dim)
        self.proj = nn.Linear(value_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        tokens = x.flatten(1, 2)
        q, k, v = (layer(tokens).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        keys = softmax_over_positions(k)
        with without_autocast(x.device):
            summary = torch.einsum("bngk,bngv->bgkv", keys, v.to(keys.dtype))
            read = torch.einsum("bngk,bgkv->bngv", q.to(keys.dtype).softmax(-1), summary)
        return x + self.proj(read.to(v.dtype).flatten(2)).unflatten(1, x.shape[1:3])
