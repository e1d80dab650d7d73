"""Focused linear attention (FLatten, arXiv:2308.00442)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels import linear_attention
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_size
from visionzoo.layers.position import PositionTable


class FocusedLinearMixer(Mixer):
    """Linear attention with sharpened features, and a convolution of v for what its low rank cannot say.

        yᵢ = φ(qᵢ)·(Σⱼ φ(kⱼ) vⱼᵀ) / φ(qᵢ)·Σⱼ φ(kⱼ) + dwconv(v), φ(x) = |x|·relu(x)ᵖ / |relu(x)ᵖ|

    Time: O(N·C·(D + k²)); memory: O(N·C).

    Features, sums and states are float32 at least, whatever the input: half
    precision stays finite at any number of tokens. Keys carry a learned position; a map of another size than the
    table gets it interpolated (bicubic, as the authors do when they fine-tune at another size).

    Facts from https://github.com/LeapLabTHU/FLatten-Transformer at abdb115 (no license).

    Args:
        dim: channels C.
        num_heads: attention heads.
        focusing_factor: power of the features.
        kernel_size: k, odd, of the depthwise convolution of v, which has one kernel for all heads; None for none.
        position_size: side, or height and width, of the table of positions of the keys; None for none.
        lepe_kernel: kernel, odd, of a second depthwise convolution of v, with its own kernel for each channel
            (locally enhanced position encoding of CSWin); None for none.
        qkv_bias: whether the projection to q, k, v has a bias.
        reduction: side of the patches of tokens that a convolution and a norm turn into a key and a value each; rows
            and columns after the last whole patch have no part, and the table of positions is of the smaller map. The
            convolution of v sees the sequence of the values stretched linearly to that of the tokens, as released.

    Raises:
        ValueError: if a kernel is even or a number not positive.

    >>> import torch
    >>> FocusedLinearMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        focusing_factor: float = 3.0,
        kernel_size: int | None = 5,
        position_size: int | tuple[int, int] | None = None,
        lepe_kernel: int | None = None,
        qkv_bias: bool = True,
        reduction: int = 1,
    ):
        super().__init__(dim, num_heads)
        self.check_kernels(kernel_size=kernel_size, lepe_kernel=lepe_kernel)
        if focusing_factor <= 0:
            raise ValueError(f"FocusedLinearMixer: focusing_factor must be positive, got {focusing_factor=}")
        if reduction < 1:
            raise ValueError(f"FocusedLinearMixer: reduction must be 1 or more, got {reduction=}")
        self.focusing_factor = focusing_factor
        self.reduction = reduction
        if reduction > 1:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.sr = ConvNorm(dim, dim, reduction, reduction, norm_layer=LayerNorm)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))  # three axes as released, where weight decay acts on it
        self.position = None if position_size is None else PositionTable(dim, position_size, std=0.0, mode="bicubic")
        self.dwc = DepthwiseConvNHWC(self.head_dim, kernel_size, heads=self.num_heads) if kernel_size else None
        self.lepe = DepthwiseConvNHWC(dim, lepe_kernel) if lepe_kernel else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        if self.reduction > 1:
            q = self.q(x)
            k, v = self.kv(self.sr(pad_to_size(x, (self.reduction, self.reduction)))).chunk(2, dim=-1)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.position is not None:
            k = self.position(k)
        heads = (self.num_heads, self.head_dim)
        out = linear_attention(
            q.unflatten(-1, heads),
            k.unflatten(-1, heads),
            v.unflatten(-1, heads),
            feature_map="focused",
            focusing_factor=self.focusing_factor,
            temperature=F.softplus(self.scale).view(heads),
        ).flatten(3)
        if self.reduction > 1:
            v = _stretch(v, x)
        if self.dwc is not None:
            out = self.dwc(v, residual=out)
        if self.lepe is not None:
            out = self.lepe(v, residual=out)
        return self.proj(out)


def _stretch(v: Tensor, like: Tensor) -> Tensor:
    """Interpolate the sequence of the tokens of v [B, h, w, C] linearly to that of a map [B, H, W, _]."""
    height, width = like.shape[1:3]
    sequence = F.interpolate(v.flatten(1, 2).mT, size=height * width, mode="linear")
    return sequence.mT.unflatten(1, (height, width)).contiguous()
