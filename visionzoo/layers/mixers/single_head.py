"""Single-head attention on a part of the channels (SHViT, arXiv:2401.16456)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.layers.conv_norm import LinearNorm
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import GroupNorm1

PARTIAL_RATIO = 1 / 4.67  # of the channels, the paper's choice


class SingleHeadMixer(Mixer):
    """The first channels attend with one head, the others pass by; then all are projected.

        y = W·[attention(x₁), x₂], x₁ a fifth of the channels

    Time: O(N·C² + N²·P) for P channels; memory: O(N²), fused O(N·C).

    The part is normalized over height, width and its channels, and each linear layer is followed by batch
    normalization. There is no position term. Softmax and sums are float32 at least.

    torch has fused attention for few pairs of widths: on a CPU where P is `qk_dim`; on an H200 not for P = 27, that of
    C = 128, in bfloat16. Else all N² scores are held: at 65,536 tokens 16 GiB in float32 for an image, and their
    softmax beside them.

    Facts from https://github.com/ysj9909/SHViT at 6a729cc (MIT).

    Args:
        dim: channels C.
        num_heads: ignored, for the shared signature: there is one.
        partial_dim: channels P that attend; None means C / 4.67, rounded, at least one.
        qk_dim: width of queries and keys.
        act_layer: activation before the output projection.
        zero_init: start the norm after the output projection at 0, so that a residual branch starts as nothing.

    Raises:
        ValueError: if `partial_dim` is not from 1 to C, or `qk_dim` not positive.

    >>> import torch
    >>> SingleHeadMixer(64, partial_dim=16)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    SCORE_MAP = True
    RELAXES = SUBSAMPLES = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        partial_dim: int | None = None,
        qk_dim: int = 16,
        act_layer: type[nn.Module] = nn.ReLU,
        zero_init: bool = False,
    ):
        super().__init__(dim, 1)
        partial_dim = max(1, round(dim * PARTIAL_RATIO)) if partial_dim is None else partial_dim
        if not 1 <= partial_dim <= dim:
            raise ValueError(f"SingleHeadMixer: partial_dim must be from 1 to {dim=}, got {partial_dim=}")
        if qk_dim < 1:
            raise ValueError(f"SingleHeadMixer: qk_dim must be positive, got {qk_dim=}")
        self.partial_dim = partial_dim
        self.qk_dim = qk_dim
        self.norm = GroupNorm1(partial_dim)
        self.qkv = LinearNorm(partial_dim, 2 * qk_dim + partial_dim)
        self.act = act_layer()
        self.proj = LinearNorm(dim, dim, norm_weight=0.0 if zero_init else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        part, rest = x.split([self.partial_dim, self.dim - self.partial_dim], dim=-1)
        qkv = self.qkv(self.norm(part)).flatten(1, 2).unsqueeze(1)  # [B, 1, N, 2·qk_dim + P]
        q, k, v = qkv.split([self.qk_dim, self.qk_dim, self.partial_dim], dim=-1)
        part = self.attend(q, k, v).reshape(part.shape)
        return self.proj(self.act(torch.cat([part, rest], dim=-1)))
