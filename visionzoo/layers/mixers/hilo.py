"""HiLo attention: some heads see windows, the others averages (LITv2, arXiv:2205.13213)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels import routed_attention
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.padding import crop, pad_to_multiple


class HiLoMixer(Mixer):
    """High frequencies by attention inside windows, low ones by attention to the windows' means.

        y = [attention inside w × w windows, attention to the windows' means]

    Time: O(N·C² + N²·C/w²); memory: O(N·C).

    Softmax is float32 at least. Each group of heads has its own output projection. A map that the
    windows do not divide is padded with zeros at the bottom and right; as released, these take part in the windows
    (their keys and values are the biases) and in the means.

    Facts from https://github.com/ziplab/LITv2 at 7501c86 (Apache-2.0).

    Args:
        dim: channels C.
        num_heads: attention heads, of both groups together.
        window_size: side w of the windows, in tokens; with 1 all heads are of the low group, which is plain attention.
        alpha: share of the heads, from 0 to 1 and rounded down to whole heads, that are of the low group.
        qkv_bias: whether the projections to q, k, v have a bias.

    Raises:
        ValueError: if the window is not positive or `alpha` no share.

    >>> import torch
    >>> HiLoMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    RELAXES = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        if window_size < 1 or not 0 <= alpha <= 1:
            raise ValueError(
                f"HiLoMixer: window_size must be positive and alpha from 0 to 1, got {window_size=} and {alpha=}"
            )
        self.window_size = window_size
        low = (self.num_heads if window_size == 1 else int(self.num_heads * alpha)) * self.head_dim
        high = dim - low
        self.low_q, self.low_kv, self.low_proj, self.high_qkv, self.high_proj = (
            nn.Linear(in_dim, out_dim, bias=bias) if out_dim else None
            for in_dim, out_dim, bias in (
                (dim, low, qkv_bias),
                (dim, 2 * low, qkv_bias),
                (low, low, True),
                (dim, 3 * high, qkv_bias),
                (high, high, True),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        padded = pad_to_multiple(x, (self.window_size, self.window_size))
        parts = []
        if self.high_proj is not None:
            parts.append(crop(self.high_proj(self._in_windows(padded)), x.shape[1:3]))
        if self.low_proj is not None:
            parts.append(self.low_proj(self._to_means(x, padded)))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0].contiguous()

    def _in_windows(self, x: Tensor) -> Tensor:
        assert self.high_qkv is not None
        q, k, v = self.high_qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        regions = (x.shape[1] // self.window_size, x.shape[2] // self.window_size)
        out = routed_attention(q, k, v, None, regions=regions)
        return self.relax(out, lambda: routed_attention(torch.zeros_like(q), k, v, None, regions=regions)).flatten(3)

    def _to_means(self, x: Tensor, padded: Tensor) -> Tensor:
        assert self.low_q is not None and self.low_kv is not None
        q = self.low_q(x).unflatten(-1, (-1, self.head_dim))
        if self.window_size > 1:
            padded = F.avg_pool2d(padded.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        k, v = self.low_kv(padded).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # [B, G, N, D]
        return self.attend(q, k, v).transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])
