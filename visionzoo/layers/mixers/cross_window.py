"""Cross-shaped window attention (CSWin, arXiv:2107.00652)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels import routed_attention
from visionzoo.kernels.regions import from_regions, to_regions
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import ConvNHWC


class CrossWindowMixer(Mixer):
    """The first half of the heads attends inside vertical stripes, the others inside horizontal ones; O(N·√N·s·C).

    Of an odd number of heads one more is vertical; a single head has vertical stripes only.

    A depthwise 3×3 convolution of v inside each stripe is added to the output (locally enhanced position encoding).
    Where the stripes do not divide the map, q, k and v are padded with zeros on both sides, and the padded tokens
    take part in attention, as in the authors' segmentation code. Softmax is float32 at least.

    Args:
        dim: channels C.
        num_heads: attention heads.
        stripe_width: width s of the stripes, in tokens; None for one window, the whole map.
        qkv_bias: whether the projection to q, k, v has a bias.
        backend: of `visionzoo.kernels.routed_attention`.

    Raises:
        ValueError: if the width is not positive.

    >>> import torch
    >>> CrossWindowMixer(64, 2, stripe_width=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        stripe_width: int | None = 7,
        qkv_bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__(dim, num_heads)
        if stripe_width is not None and stripe_width < 1:
            raise ValueError(f"CrossWindowMixer: stripe_width must be positive or None, got {stripe_width=}")
        self.stripe_width = stripe_width
        self.backend = backend
        horizontal = 0 if stripe_width is None else self.num_heads // 2
        self.branch_heads = [heads for heads in (self.num_heads - horizontal, horizontal) if heads]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        widths = [heads * self.head_dim for heads in self.branch_heads]
        self.lepe = nn.ModuleList(ConvNHWC(width, width, 3, padding=1, groups=width) for width in widths)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        height, width = x.shape[1:3]
        stripe = self.stripe_width
        windows = [(height, width)] if stripe is None else [(height, stripe), (stripe, width)]
        branches = zip(*(t.split(self.branch_heads, dim=3) for t in self.split_heads(self.qkv(x))), strict=True)
        out = [
            self._attend(q, k, v, window, lepe)
            for (q, k, v), window, lepe in zip(branches, windows, self.lepe, strict=False)
        ]
        return self.proj(torch.cat(out, dim=-1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], lepe: nn.Module) -> Tensor:
        """Attention and position term of [B, H, W, G, D] inside windows: [B, H, W, G·D]."""
        height, width = q.shape[1:3]
        extra = (-height % window[0], -width % window[1])
        top, left = extra[0] // 2, extra[1] // 2
        if any(extra):
            pad = (0, 0, 0, 0, left, extra[1] - left, top, extra[0] - top)
            q, k, v = (F.pad(t, pad) for t in (q, k, v))
        size = q.shape[1:3]
        regions = (size[0] // window[0], size[1] // window[1])
        out = routed_attention(q, k, v, None, regions=regions, backend=self.backend).flatten(3)
        inside = to_regions(v.flatten(3), regions)  # [B, R, n, C]
        local = lepe(inside.flatten(0, 1).unflatten(1, window)).flatten(1, 2).unflatten(0, inside.shape[:2])
        out = out + from_regions(local, regions, size)
        return out[:, top : top + height, left : left + width]
