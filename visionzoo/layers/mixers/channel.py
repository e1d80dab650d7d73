"""Channel-group attention (DaViT, arXiv:2204.03645): channels attend to channels, over all positions."""

from __future__ import annotations

from torch import Tensor, nn

from visionzoo.layers.mixers.base import Mixer


class ChannelMixer(Mixer):
    """Attention between the channels of each head, with whole maps as their features; O(N·C·D), linear in tokens.

    With q, k, v as [N, D] matrices of one head the output is (softmax(D^-½ kᵀ v) qᵀ)ᵀ: as released, q plays the part
    that v has elsewhere, and the scale is that of the head width, not of the token count.

    Args:
        dim: channels C.
        num_heads: channel groups.
        qkv_bias: whether the projection to q, k, v has a bias.

    >>> import torch
    >>> ChannelMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, num_heads: int | None = None, *, qkv_bias: bool = True):
        super().__init__(dim, num_heads)
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        # [B, H, W, G, D] -> [B, G, N, D]
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in self.split_heads(self.qkv(x)))
        attention = ((k * self.scale).transpose(-2, -1) @ v).softmax(dim=-1)  # [B, G, D, D]
        out = q @ attention.transpose(-2, -1)
        return self.proj(out.transpose(1, 2).reshape(x.shape))
