"""Cross-shaped window attention (CSWin, arXiv:2107.00652)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.kernels import routed_attention
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.padding import crop, pad_to_multiple


class CrossWindowMixer(Mixer):
    """The first half of the heads attends inside vertical stripes, the others inside horizontal ones.

        yᵢ = Σ over i's stripe of softmaxⱼ(qᵢ·kⱼ / √D) vⱼ, half of the heads upright, half across, + conv(v)

    Time: O(N·√N·s·C); memory: O(N·C) in kernels, else O(N·√N·s·G).

    Of an odd number of heads one more is vertical; a single head has vertical stripes only.

    A depthwise 3×3 convolution of v inside each stripe is added to the output (locally enhanced position encoding).
    Where the stripes do not divide the map, q, k and v are padded with zeros on both sides, and the padded tokens
    take part in attention, as in the authors' segmentation code. Softmax is float32 at least.

    Facts from https://github.com/microsoft/CSWin-Transformer at f111ae2 (MIT).

    Args:
        dim: channels C.
        num_heads: attention heads.
        stripe_width: width s of the stripes, in tokens; None for one window, the whole map.
        qkv_bias: whether the projection to q, k, v has a bias.

    Raises:
        ValueError: if the width is not positive.

    >>> import torch
    >>> CrossWindowMixer(64, 2, stripe_width=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    RELAXES = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        stripe_width: int | None = 7,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        if stripe_width is not None and stripe_width < 1:
            raise ValueError(f"CrossWindowMixer: stripe_width must be positive or None, got {stripe_width=}")
        self.stripe_width = stripe_width
        windows: list[tuple[int | None, int | None]] = [(None, stripe_width), (stripe_width, None)]
        horizontal = 0 if stripe_width is None else self.num_heads // 2 * self.head_dim
        self.branch_widths = [width for width in (dim - horizontal, horizontal) if width]
        self.windows = windows[: len(self.branch_widths)]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = nn.ModuleList(DepthwiseConvNHWC(width, 3) for width in self.branch_widths)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        qkv = [t.split(self.branch_widths, dim=-1) for t in self.qkv(x).chunk(3, dim=-1)]
        out = [
            self._attend(q, k, v, window, lepe)
            for q, k, v, window, lepe in zip(*qkv, self.windows, self.lepe, strict=True)
        ]
        return self.proj(torch.cat(out, dim=-1))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: tuple[int | None, int | None], lepe: nn.Module
    ) -> Tensor:
        """Attention and position term of [B, H, W, C] inside windows of a height and width, None for the map's."""
        height, width = q.shape[1:3]
        q, k, v = (pad_to_multiple(t, (window[0] or 1, window[1] or 1), both_sides=True) for t in (q, k, v))
        tall, wide = q.shape[1:3]
        rows, columns = (tall // window[0] if window[0] else 1), (wide // window[1] if window[1] else 1)
        q, k, v_heads = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        regions = (rows, columns)
        out = routed_attention(q, k, v_heads, None, regions=regions)
        out = self.relax(out, lambda: routed_attention(torch.zeros_like(q), k, v_heads, None, regions=regions))
        out = lepe(v, residual=out.flatten(3), regions=None if window == (None, None) else regions)
        return crop(out, (height, width), both_sides=True)
