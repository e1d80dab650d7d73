"""Gated linear unit in the place of attention (Activator, arXiv:2405.15953)."""

from __future__ import annotations

from torch import Tensor

from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.mlp import GLU_ACTIVATIONS, NormedGlu


class GluMixer(Mixer):
    """A gated linear unit of each token by itself, without any mixing of tokens; norm in float32 at least.

        yᵢ = W₃(act(W₁ xᵢ) ⊙ W₂ xᵢ)

    Time: O(N·C²); memory: O(N·C).

    Facts from https://github.com/Abdullah-88/Activator at 631c38a (BSD-3-Clause).

    Args:
        dim: channels C.
        num_heads: ignored.
        hidden_ratio: channels of the unit's two factors over C.
        activation: of the first factor: "gelu", "silu" or "relu".

    Raises:
        ValueError: if the unit has no channels, or the activation is another.

    >>> import torch
    >>> GluMixer(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(self, dim: int, num_heads: int | None = None, *, hidden_ratio: float = 2.0, activation: str = "gelu"):
        super().__init__(dim, num_heads)
        if int(dim * hidden_ratio) < 1:
            raise ValueError(f"GluMixer: hidden_ratio must give one channel at least, got {dim=} and {hidden_ratio=}")
        if activation not in GLU_ACTIVATIONS:
            raise ValueError(f"GluMixer: unknown {activation=}, expected one of {tuple(GLU_ACTIVATIONS)}")
        self.unit = NormedGlu(dim, int(dim * hidden_ratio), act_layer=GLU_ACTIVATIONS[activation])

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        return self.unit(x)
