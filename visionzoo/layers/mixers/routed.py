"""Bi-level routing attention (BiFormer, arXiv:2303.08810)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.kernels import route_regions, routed_attention
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.padding import crop, pad_to_multiple


class RoutedMixer(Mixer):
    """Each region attends to the k regions that its mean query likes best.

        yᵢ = Σ over the k regions that i's region likes of softmaxⱼ(qᵢ·kⱼ / √C) vⱼ + dwconv(v)

    Time: O(N·k·N/S²·C) for S² regions; memory: O(N·C) in kernels, else O(N·k·N/S²·G).

    Scores and softmax are float32 at least, the rest is in the dtype of the input or of autocast.

    The map is cut into a fixed number of regions, so a region grows with the map. Where they do not divide the map
    it is padded with zeros at the bottom and right before the projection to q, k, v. As in the authors' detection
    and segmentation code the padded tokens then count like others: in the region means, as keys and values, and in
    the position term.

    Facts from https://github.com/rayleizhu/BiFormer at 1697bbb (MIT).

    Args:
        dim: channels C.
        num_heads: attention heads.
        regions: regions per side S, or (vertical, horizontal).
        topk: regions that a region attends to, from 1 to their number.
        scale: of routing scores and of attention; None means dim^-½ (of all channels, as released).
        qkv_bias: whether the projection to q, k, v has a bias.
        kv_heads: heads of keys and values, see `Mixer`.
        lepe_kernel: kernel of the depthwise convolution of v that is added before the output projection (locally
            enhanced position encoding); odd, or None for none.
        mask_padding: leave padded tokens out of means, attention and position term instead.

    Raises:
        ValueError: if the heads do not divide the channels, the kernel is even, or `topk` is more than the regions.

    >>> import torch
    >>> RoutedMixer(64, 2, regions=3, topk=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    RELAXES = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        regions: int | tuple[int, int] = 7,
        topk: int = 4,
        scale: float | None = None,
        qkv_bias: bool = True,
        lepe_kernel: int | None = 5,
        mask_padding: bool = False,
        kv_heads: int | None = None,
    ):
        super().__init__(dim, num_heads, kv_heads=kv_heads)
        self.check_kernels(lepe_kernel=lepe_kernel)
        self.regions: tuple[int, int] = to_2tuple(regions)
        if min(self.regions) < 1:
            raise ValueError(f"RoutedMixer: regions must be positive, got {regions=}")
        if not 1 <= topk <= self.regions[0] * self.regions[1]:
            raise ValueError(
                f"RoutedMixer: topk must be from 1 to the number of regions "
                f"({self.regions[0]}·{self.regions[1]} = {self.regions[0] * self.regions[1]}), got {topk=}"
            )
        self.topk = topk
        self.scale = dim**-0.5 if scale is None else scale
        self.mask_padding = mask_padding
        self.qkv = nn.Linear(dim, self.qkv_dim, bias=qkv_bias)
        self.lepe = DepthwiseConvNHWC(dim, lepe_kernel) if lepe_kernel else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        height, width = x.shape[1:3]
        q, k, v = self.split_heads(self.qkv(pad_to_multiple(x, self.regions)))
        options: dict[str, Any] = {
            "regions": self.regions,
            "scale": self.scale,
            "valid_size": (height, width) if self.mask_padding else None,
        }
        index = route_regions(q, k, topk=self.topk, **options)
        options["check_index"] = False
        out = routed_attention(q, k, v, index, **options)
        out = self.relax(out, lambda: routed_attention(torch.zeros_like(q), k, v, index, **options)).flatten(3)
        if self.mask_padding:
            out, v = out[:, :height, :width], v[:, :height, :width]
        if self.lepe is not None:
            out = self.lepe(v.flatten(3), residual=out)
        return self.proj(crop(out, (height, width)))
