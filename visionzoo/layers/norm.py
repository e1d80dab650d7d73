"""Norms over the last axis, whatever comes before it."""

from __future__ import annotations

from torch import Tensor, nn

from visionzoo.kernels import layer_norm
from visionzoo.layers.tracing import one_node


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of [..., C] over C, by `visionzoo.kernels.layer_norm`: faster for narrow rows on a GPU.

    Under autocast the output has autocast's dtype, not float32.

    >>> import torch
    >>> LayerNorm(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(dim, eps=eps)

    @one_node  # as torch's own layers are
    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., C]."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps)
