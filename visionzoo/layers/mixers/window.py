"""Attention inside square windows (as DaViT uses it, arXiv:2204.03645): no shift, no position bias."""

from __future__ import annotations

from torch import Tensor, nn

from visionzoo.kernels import routed_attention
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.padding import pad_to_multiple


class WindowMixer(Mixer):
    """Tokens attend to the tokens of their window; O(N·w²·C).

    A map that the window does not divide is padded with zeros at the bottom and right before the projection to
    q, k, v. As released the padded tokens take part in attention (their keys and values are the biases).

    Args:
        dim: channels C.
        num_heads: attention heads.
        window_size: side w of the windows, in tokens.
        qkv_bias: whether the projection to q, k, v has a bias.
        mask_padding: leave padded tokens out of attention instead.
        backend: of `visionzoo.kernels.routed_attention`.

    >>> import torch
    >>> WindowMixer(64, 2, window_size=4)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: int = 7,
        qkv_bias: bool = True,
        mask_padding: bool = False,
        backend: str = "auto",
    ):
        super().__init__(dim, num_heads)
        if window_size < 1:
            raise ValueError(f"WindowMixer: window_size must be positive, got {window_size=}")
        self.window_size = window_size
        self.mask_padding = mask_padding
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        height, width = x.shape[1:3]
        x = pad_to_multiple(x, (self.window_size, self.window_size))
        q, k, v = self.split_heads(self.qkv(x))
        out = routed_attention(
            q,
            k,
            v,
            None,
            regions=(x.shape[1] // self.window_size, x.shape[2] // self.window_size),
            valid_size=(height, width) if self.mask_padding else None,
            backend=self.backend,
        )
        return self.proj(out.flatten(3)[:, :height, :width])
