"""Halo attention (HaloNet, arXiv:2103.12731)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.kernels import halo_attention
from visionzoo.layers.mixers.base import Mixer


class HaloMixer(Mixer):
    """The tokens of a block attend to the block and its rim, the halo.

        yᵢ = Σ over i's block and its rim of softmaxⱼ(qᵢ·kⱼ / √D + qᵢ·r(j - i)) vⱼ

    Time: O(N·w²·C); memory: O(N·C) in kernels, else O(N·w²·G).

    A window is w = block_size + 2·halo_size tokens wide. Each mixer learns a vector for every vertical and every
    horizontal offset; their products with the query are added to the scores, unscaled. What a window has beyond the
    map, at its borders and where blocks do not divide it, are keys and values of zero, and as in timm they take part
    in attention with their positions. The softmax is float32 at least, the rest is in the dtype of the input or of
    autocast.

    Facts from https://github.com/huggingface/pytorch-image-models at 1.0.31 (Apache-2.0), as the authors released none.

    Args:
        dim: channels C.
        num_heads: attention heads.
        block_size: side of the blocks, in tokens.
        halo_size: width of the rim, in tokens.
        stride: step between the queries kept along each axis; must divide `block_size`. The map shrinks by it, rounded
            up.
        head_dim: width D of queries and keys of a head; None means C / heads.
        value_dim: channels of the values of all heads together; None means C.
        qkv_bias: whether the projections to q, k, v have a bias.
        kv_heads: heads of keys and values, see `Mixer`.
        proj: whether a linear layer back to C channels follows; without it the output has `value_dim` channels.
        mask_padding: leave what is beyond the map out of attention instead.

    Raises:
        ValueError: if heads, blocks, rim or stride do not fit each other.

    >>> import torch
    >>> HaloMixer(64, 2, block_size=4, halo_size=1)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    NO_WEIGHT_DECAY = ("rel_height", "rel_width")
    RELAXES = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        head_dim: int | None = None,
        value_dim: int | None = None,
        qkv_bias: bool = False,
        proj: bool = True,
        mask_padding: bool = False,
        kv_heads: int | None = None,
    ):
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"HaloMixer: head_dim must be positive, got {head_dim=}")
        super().__init__(dim, num_heads, head_dim=head_dim, kv_heads=kv_heads)
        if block_size < 1 or halo_size < 0:
            raise ValueError(
                f"HaloMixer: block_size must be positive and halo_size not negative, got {block_size=}, {halo_size=}"
            )
        if stride < 1 or block_size % stride:
            raise ValueError(f"HaloMixer: stride must be positive and divide block_size, got {stride=}, {block_size=}")
        value_dim = dim if value_dim is None else value_dim
        if value_dim < 1 or value_dim % self.num_heads:
            raise ValueError(
                f"HaloMixer: num_heads must divide value_dim, got {value_dim=} and num_heads={self.num_heads}"
            )
        self.value_head_dim = value_dim // self.num_heads
        self.out_dim = dim if proj else value_dim
        self.block_size = block_size
        self.halo_size = halo_size
        self.stride = stride
        self.mask_padding = mask_padding
        self.q = nn.Linear(dim, self.num_heads * self.head_dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, self.kv_heads * (self.head_dim + self.value_head_dim), bias=qkv_bias)
        offsets = 2 * (block_size + 2 * halo_size) - 1
        self.rel_height = nn.Parameter(torch.empty(offsets, self.head_dim))
        self.rel_width = nn.Parameter(torch.empty(offsets, self.head_dim))
        self.proj = nn.Linear(value_dim, dim) if proj else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize projections by their inputs' width and embeddings by their own, as timm does."""
        for linear in (self.q, self.kv):
            nn.init.trunc_normal_(linear.weight, std=self.dim**-0.5)
        for table in (self.rel_height, self.rel_width):
            nn.init.trunc_normal_(table, std=self.head_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, ⌈H / stride⌉, ⌈W / stride⌉, C], or `value_dim` channels without `proj`."""
        self.check_input(x)
        q = self.q(x[:, :: self.stride, :: self.stride]).unflatten(-1, (self.num_heads, -1))
        kv = self.repeat_heads(self.kv(x).unflatten(-1, (self.kv_heads, -1)))
        k, v = kv.split((self.head_dim, self.value_head_dim), dim=-1)
        positions = (self.rel_height.to(q.dtype), self.rel_width.to(q.dtype))  # under autocast q has another dtype
        seen: dict[str, Any] = {
            "block_size": self.block_size,
            "halo_size": self.halo_size,
            "stride": self.stride,
            "mask_padding": self.mask_padding,
        }
        out = halo_attention(q, k, v, *positions, **seen)
        # positions count by their products with queries
        out = self.relax(out, lambda: halo_attention(torch.zeros_like(q), k, v, *positions, **seen))
        return self.proj(out.flatten(3))
