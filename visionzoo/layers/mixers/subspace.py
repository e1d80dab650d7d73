"""Attention inside learned subspaces (CRATE, arXiv:2306.01129): a step that lowers the tokens' coding rate in them."""

from __future__ import annotations

from torch import Tensor, nn

from visionzoo.layers.attention import hide
from visionzoo.layers.mixers.base import Mixer


class SubspaceMixer(Mixer):
    """Attention whose queries, keys and values are one projection; softmax in float32 at least.

        y = W Σ_g Zᵍ softmax(Zᵍᵀ Zᵍ / √D), Zᵍ = Uᵍᵀ x

    Time: O(N²·C); memory: O(N·C).

    Each head is a subspace, and tokens that are alike in it are drawn together (multi-head subspace self-attention).

    Facts from https://github.com/Ma-Lab-Berkeley/CRATE at 674408f (MIT).

    Args:
        dim: channels C.
        num_heads: subspaces, attention heads.
        head_dim: dimensions of a subspace; None means dim / num_heads.

    Raises:
        ValueError: if the heads do not divide the channels, or a subspace has no dimensions.

    >>> import torch
    >>> SubspaceMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    SCORE_MAP = True
    RELAXES = SUBSAMPLES = True

    def __init__(self, dim: int, num_heads: int | None = None, *, head_dim: int | None = None):
        super().__init__(dim, num_heads, head_dim=head_dim)
        if self.head_dim < 1:
            raise ValueError(f"SubspaceMixer: head_dim must be positive, got {head_dim=}")
        self.subspaces = nn.Linear(dim, self.num_heads * self.head_dim, bias=False)
        whole = self.num_heads == 1 and self.head_dim == dim
        self.proj: nn.Module = nn.Identity() if whole else nn.Linear(self.num_heads * self.head_dim, dim)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: any set of tokens will do."""
        return True

    @property
    def takes_dropped_tokens(self) -> bool:
        """Yes: they are hidden from the others."""
        return True

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; `keep` [B, N] says which tokens others see, None for all."""
        self.check_input(x)
        # [B, H, W, G·D] -> [B, G, N, D]
        projected = self.subspaces(x).flatten(1, 2).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        out = self.attend(projected, projected, projected, bias=hide(keep, projected.dtype)).transpose(1, 2).flatten(2)
        return self.proj(out.unflatten(1, x.shape[1:3]))
