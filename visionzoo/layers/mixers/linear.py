"""Linear attention with a plain feature map (Katharopoulos et al., arXiv:2006.16236; Shen et al., arXiv:1812.01243)."""

from __future__ import annotations

from torch import Tensor, nn

from visionzoo.kernels import linear_attention
from visionzoo.layers.mixers.base import Mixer


class LinearMixer(Mixer):
    """Every token attends to every token by products of features; O(N·C·D) for heads of width D.

    Features, sums and states are float32 at least, whatever the input.

    Args:
        dim: channels C.
        num_heads: attention heads.
        feature_map: "relu", "elu" or "softmax", see `visionzoo.kernels.linear_attention`.
        qkv_bias: whether the projection to q, k, v has a bias.

    Raises:
        ValueError: if the feature map is unknown.

    >>> import torch
    >>> LinearMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    FEATURE_MAPS = ("relu", "elu", "softmax")

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        feature_map: str = "elu",
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        if feature_map not in self.FEATURE_MAPS:
            raise ValueError(f"LinearMixer: unknown {feature_map=}, expected one of {self.FEATURE_MAPS}")
        self.feature_map = feature_map
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: any set of tokens will do."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        q, k, v = self.split_heads(self.qkv(x))
        out = linear_attention(q, k, v, feature_map=self.feature_map)
        return self.proj(out.flatten(3))
