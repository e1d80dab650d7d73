"""SDANet's selective dense attention: every level of a pyramid is refined from all levels, arXiv:2211.10763.

Facts from mmdet/models/necks/attfpn.py of https://github.com/lutao2021/PIDray at 2acc524 (no license at its root; a
fork of mmdetection); the code here is our own. The authors' has five levels of 256 channels, this any number of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.layers.arguments import Positive
from visionzoo.layers.gates import GateNCHW
from visionzoo.layers.gates.cbam import max_and_mean
from visionzoo.layers.gates.magc import MagcGate
from visionzoo.layers.part import Part
from visionzoo.layers.tracing import one_node


class LevelAttention(Part):
    """Refine each level of a pyramid by all of them, chosen by channel and by position; O(L²·N·C) for L levels.

    All levels are brought to the size of the one that is refined: finer ones by adaptive max pooling, coarser ones by
    the nearest value. They are summed twice with softmax weights over the levels, which come from the mean of the map
    for each channel, and from mean and maximum of the channels for each position. The two sums are added, global
    context (`MagcGate` with one head) is added to them, and all that to the level. Every level has its own
    weights, and sees the others as they came. Softmax is float32 at least under autocast, the rest has the
    dtype of the input or of autocast.

    Args:
        dim: channels C of every level.
        num_levels: levels L.
        reduction: C over the width between the mean of the map and the weights of the channels.
        kernel_size: side of the convolution from mean and maximum to the weights of the positions, odd.
        context_ratio: width of the context's MLP over C.

    Raises:
        ValueError: if there are fewer than two levels, an option is not positive, nothing remains of the channels, or
            the kernel is even.

    >>> maps = [torch.zeros(1, 32, 8, 12), torch.zeros(1, 32, 4, 6), torch.zeros(1, 32, 2, 3)]
    >>> [tuple(x.shape) for x in LevelAttention(32, 3).eval()(maps)]
    [(1, 32, 8, 12), (1, 32, 4, 6), (1, 32, 2, 3)]
    """

    CHECKPOINT_KEYS: ClassVar[dict[str, list[tuple[str, Any]]]] = {
        "authors": [
            (r"^selective_attention_(\d+)\.", r"levels.\1."),
            (r"\.channel_att\.fc\.", ".squeeze."),
            (r"\.channel_att\.fcs\.", ".channel_scores."),
            (r"\.spatial_att\.conv\.", ".position_scores."),
            (r"\.refine\.conv_mask\.", ".context.gate.scores."),
            (r"\.refine\.channel_add_conv\.", ".context.gate.mlp."),
        ]
    }

    def __init__(
        self,
        dim: Positive,
        num_levels: int,
        *,
        reduction: float = 2,
        kernel_size: int = 7,
        context_ratio: float = 0.0625,
    ):
        super().__init__()
        if num_levels < 2:
            raise ValueError(f"LevelAttention: expected two levels or more, got {num_levels=}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"LevelAttention: kernel_size must be odd and positive, got {kernel_size=}")
        if not 0 < reduction <= dim:
            raise ValueError(f"LevelAttention: reduction must be above 0 and at most {dim=}, got {reduction=}")
        if context_ratio * dim < 1:
            raise ValueError(
                f"LevelAttention: nothing remains of {dim=} channels with {context_ratio=}; pass {1 / dim:.3g} or more"
            )
        self.dim, self.num_levels = dim, num_levels
        self.levels = nn.ModuleList(
            _Level(dim, num_levels, i, int(dim // reduction), kernel_size, context_ratio) for i in range(num_levels)
        )

    @one_node  # it looks at shapes
    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Refine L levels [B, C, H, W], finest first, of any sizes.

        Raises:
            ValueError: if there are other levels or channels, or one image in training, for which there is no batch
                norm.
        """
        if len(maps) != self.num_levels or any(x.ndim != 4 or x.shape[1] != self.dim for x in maps):
            raise ValueError(
                f"LevelAttention: expected {self.num_levels} levels [B, {self.dim}, H, W], "
                f"got {[tuple(x.shape) for x in maps]}"
            )
        for x in maps:
            self.check_inputs("B C H W", x, C=self.dim)
        normalizes = any(isinstance(m, nn.BatchNorm2d) and m.training for m in self.modules())
        if normalizes and maps[0].shape[0] == 1:
            raise ValueError(
                "LevelAttention: one image has no batch statistics of its mean: train with batches of two or more, or "
                "put the batch norms into eval mode"
            )
        return tuple(level(maps) for level in self.levels)


class _Level(nn.Module):
    """What refines one level."""

    def __init__(self, dim: int, num_levels: int, index: int, hidden: int, kernel_size: int, context_ratio: float):
        super().__init__()
        self.index = index
        self.squeeze = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU())
        self.channel_scores = nn.ModuleList(nn.Conv2d(hidden, dim, 1) for _ in range(num_levels))
        self.position_scores = nn.ModuleList(
            nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False) for _ in range(num_levels)
        )
        self.context = GateNCHW(MagcGate(dim, ratio=context_ratio, num_heads=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the level, [B, C, H, W]."""
        size = maps[self.index].shape[2:]
        levels = torch.stack(
            [
                F.adaptive_max_pool2d(x, size) if i < self.index else F.interpolate(x, size=size)
                for i, x in enumerate(maps)
            ],
            1,
        )
        total = levels.sum(1)
        mean = self.squeeze(total.mean((2, 3), keepdim=True))
        channels = torch.stack([score(mean) for score in self.channel_scores], 1).softmax(1)
        pooled = max_and_mean(total, 1).flip(-1).permute(0, 3, 1, 2)  # the mean comes first
        positions = torch.stack([score(pooled) for score in self.position_scores], 1).softmax(1)
        return maps[self.index] + self.context((levels * channels).sum(1) + (levels * positions).sum(1))
