"""EPFF of ViDT+ (efficient pyramid feature fusion, arXiv:2204.07962): maps of a backbone fused from coarse to fine.

Facts from methods/vidt/fpn_fusion.py of https://github.com/naver-ai/vidt at a8c48b5 (Apache-2.0); the code here is our
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.layers.norm import in_groups
from visionzoo.layers.part import Part


class PyramidFusion(Part):
    """Bring maps to one width, and add to each what the coarser ones became, enlarged and refined; O(N·C·C').

    Args:
        in_channels: of the maps, finest first.
        out_channels: of all levels, a positive multiple of 32.
        hidden_channels: of the bottlenecks that refine, 1 or more.

    Raises:
        ValueError: there is no map, or a width is not such.

    >>> import torch
    >>> maps = [torch.zeros(1, 8, 8, 12), torch.zeros(1, 16, 4, 6)]
    >>> [tuple(x.shape) for x in PyramidFusion([8, 16], 32)(maps)]  # coarsest first, as released
    [(1, 32, 4, 6), (1, 32, 8, 12)]
    """

    CHECKPOINT_KEYS: ClassVar[dict[str, list[tuple[str, Any]]]] = {
        "authors": [
            (r"refinenet_3\.(smoothing|resConfUnit1)\.", None),  # which no forward pass uses
            (r"\bmulti_scaler\.layer_(\d)_rn\.", r"reduce.\1.0."),
            (r"\bmulti_scaler\.p_norm_(\d)\.", r"reduce.\1.1."),
            (r"\bmulti_scaler\.refinenet_(\d)\.smoothing\.", r"smooth.\1."),
            (r"\bmulti_scaler\.refinenet_(\d)\.resConfUnit1\.", r"lateral.\1."),
            (r"\bmulti_scaler\.refinenet_(\d)\.resConfUnit2\.", r"refine.\1."),
        ]
    }

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256, hidden_channels: int = 64):
        super().__init__()
        if not in_channels or out_channels < 1 or out_channels % 32 or hidden_channels < 1:
            raise ValueError(
                "PyramidFusion: expected maps, a positive multiple of 32 channels of the levels, and 1 channel or more "
                f"of the bottlenecks, got {in_channels=}, {out_channels=} and {hidden_channels=}"
            )
        self.in_channels = tuple(in_channels)
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, out_channels, 1), nn.GroupNorm(32, out_channels))
            for channels in in_channels
        )
        for part in self.reduce:
            conv: Any = part[0]  # type: ignore[index]
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        finer = range(len(in_channels) - 1)
        self.smooth = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 1) for _ in finer)
        self.lateral = nn.ModuleList(_Bottleneck(out_channels, hidden_channels) for _ in finer)
        self.refine = nn.ModuleList(_Bottleneck(out_channels, hidden_channels) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Fuse maps [B, C, H, W], finest first, to as many levels [B, out_channels, H, W], coarsest first.

        Raises:
            ValueError: if the maps are others.
        """
        self.check_maps(maps, self.in_channels)
        pairs: Any = zip(self.reduce, maps, strict=True)
        levels = [in_groups(norm, conv(x)) for (conv, norm), x in pairs]
        found = [self.refine[-1](levels.pop())]
        while levels:
            x, i = levels.pop(), len(levels)
            coarser = F.interpolate(found[-1], size=x.shape[2:], mode="bilinear", align_corners=True)
            found.append(self.refine[i](self.smooth[i](coarser) + self.lateral[i](x)))
        return found


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.conv3 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(F.relu(x))))
        return x + self.conv3(F.relu(y))
