"""Channel-group attention (DaViT, arXiv:2204.03645): channels attend to channels, over all positions."""

from __future__ import annotations

from torch import Tensor, nn

from visionzoo.kernels import channel_attention
from visionzoo.layers.mixers.base import Mixer, zero_dropped


class ChannelMixer(Mixer):
    """Attention between the channels of each head, with whole maps as their features; O(N·C·D), linear in tokens.

    With q, k, v as [N, D] matrices of one head the output is (softmax(D^-½ kᵀ v) qᵀ)ᵀ: as released, q plays the part
    that v has elsewhere, and the scale is that of the head width, not of the token count. Scores are sums over all
    positions, which on large maps outgrow float16, so from such inputs they are float32; softmax is float32 at least,
    the rest in the dtype of the input or of autocast.

    Args:
        dim: channels C.
        num_heads: channel groups.
        qkv_bias: whether the projection to q, k, v has a bias.

    Raises:
        ValueError: if the heads do not divide the channels.

    >>> import torch
    >>> ChannelMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, num_heads: int | None = None, *, qkv_bias: bool = True):
        super().__init__(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: tokens are features here, however many."""
        return True

    @property
    def takes_dropped_tokens(self) -> bool:
        """Yes: keys of zeros add nothing."""
        return True

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; `keep` [B, N] is False for tokens that others do not see."""
        self.check_input(x)
        q, k, v = self.split_heads(self.qkv(x))
        out = channel_attention(q, zero_dropped(k, keep), v)
        return self.proj(out.flatten(3))
