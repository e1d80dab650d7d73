"""Neighborhood attention (NAT, arXiv:2204.07143), dilated (DiNAT, 2209.15001) or strided (GNA, 2504.16922)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.kernels import neighborhood_attention
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.padding import crop, pad_to_size
from visionzoo.layers.position import NeighborhoodBias


class NeighborhoodMixer(Mixer):
    """Each token attends to the k × k tokens nearest to it.

        yᵢ = Σ over the k × k nearest of softmaxⱼ(qᵢ·kⱼ / √D + b(j - i)) vⱼ

    Time: O(N·k²·C); memory: O(N·C) in kernels, else O(N·k²·G).

    Near the borders the neighborhood is shifted to lie inside the map. With a dilation d the neighbors are d tokens
    apart. With a stride s, groups of s × s tokens share the window of the middle one (GNA), which is the faster, the
    larger s; with s = k the windows cut the map. A map with a side below k·d is padded with zeros at the bottom and
    right up to that before the projection to q, k, v; as in the authors' code (NATTEN before 0.17) the padded tokens
    take part in attention (their keys and values are the biases). The softmax is float32 at least, the rest is in the
    dtype of the input or of autocast.

    Facts from https://github.com/SHI-Labs/Neighborhood-Attention-Transformer at d334f5b (MIT).

    Args:
        dim: channels C.
        num_heads: attention heads.
        kernel_size: neighbors k along an axis, or (vertical, horizontal).
        dilation: step d from neighbor to neighbor, or (vertical, horizontal).
        stride: tokens s along an axis that share a window, or (vertical, horizontal); at most the kernel.
        relative_position_bias: add a learned number for each offset between query and key and each head.
        qkv_bias: whether the projection to q, k, v has a bias.
        kv_heads: heads of keys and values, see `Mixer`.

    Raises:
        ValueError: if kernel, dilation or stride are not positive, or the stride is larger than the kernel.

    >>> import torch
    >>> NeighborhoodMixer(64, 2, kernel_size=3, dilation=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    RELAXES = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        relative_position_bias: bool = True,
        qkv_bias: bool = True,
        kv_heads: int | None = None,
    ):
        super().__init__(dim, num_heads, kv_heads=kv_heads)
        self.kernel_size: tuple[int, int] = to_2tuple(kernel_size)
        self.dilation: tuple[int, int] = to_2tuple(dilation)
        self.window_stride: tuple[int, int] = to_2tuple(stride)
        if min(self.kernel_size) < 1 or min(self.dilation) < 1:
            raise ValueError(
                f"NeighborhoodMixer: kernel_size and dilation must be positive, got {kernel_size=} and {dilation=}"
            )
        if not all(1 <= s <= k for s, k in zip(self.window_stride, self.kernel_size, strict=True)):
            raise ValueError(
                f"NeighborhoodMixer: stride must be from 1 to kernel_size, got {stride=} and {kernel_size=}"
            )
        self.qkv = nn.Linear(dim, self.qkv_dim, bias=qkv_bias)
        self.relative_position_bias = (
            NeighborhoodBias(self.num_heads, self.kernel_size) if relative_position_bias else None
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        height, width = x.shape[1:3]
        reach = (self.kernel_size[0] * self.dilation[0], self.kernel_size[1] * self.dilation[1])
        q, k, v = self.split_heads(self.qkv(pad_to_size(x, reach)))
        bias = None if self.relative_position_bias is None else self.relative_position_bias()
        seen: dict[str, Any] = {
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "stride": self.window_stride,
        }
        out = neighborhood_attention(q, k, v, bias=bias, **seen)
        out = self.relax(out, lambda: neighborhood_attention(torch.zeros_like(q), k, v, **seen)).flatten(3)
        return self.proj(crop(out, (height, width)))
