"""EDAFormer's decoder: more embedding-free attention for coarser maps, ECCV 2024, https://arxiv.org/abs/2407.17261.

Facts from https://github.com/hyunwoo137/EDAFormer at 9f98d76 (Apache-2.0; the decoder's file has a heading of NVIDIA's
Source Code License, from SegFormer); the code here is our own. The authors fix heads and the number of blocks for three
maps; other widths and fewer maps are taken here, too. Their spatial reduction is set when the model is built, here it
acts in eval mode only, which is how they use it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionzoo.decoders.base import Decoder, conv_norm_act, resize
from visionzoo.layers.arguments import Positive
from visionzoo.layers.block import Block
from visionzoo.layers.mixers.embedding_free import EmbeddingFreeMixer
from visionzoo.layers.mlp import ConvMlp
from visionzoo.layers.norm import LayerNorm
from visionzoo.models.pvtv2 import init_by_fan_out


class EDAFormerDecoder(Decoder):
    """EDAFormer's decoder (arXiv:2407.17261): attention on the last three maps, which are joined at the finest's size.

    A level's tokens pass embedding-free attention with a norm and a GELU of its keys, then an MLP with a depthwise
    convolution, as often as `depths` says. The levels are resized and joined, coarsest first; a 1×1 convolution brings
    them to `embed_dim` channels, another one to the classes.

    Args:
        in_channels: channels of the 2 or 3 maps, finest first.
        num_classes: classes.
        embed_dim: channels before the classifier: 128 in EDAFormer-T, 768 in EDAFormer-B.
        depths: blocks of each level; the last entries where there are fewer maps.
        num_heads: heads of each level, likewise; their greatest common divisor with the channels is taken.
        reductions: side of the patches that keys come from, of each level, likewise.
        isr: inference spatial reduction, of each level, likewise: in eval mode the sides are this many times larger.
            (2, 2, 2) is the paper's, with `isr=(2, 2, 1, 1)` of the backbone `zoo_eft_*`.
        mlp_ratio: hidden width of the MLPs over the channels: 2 in EDAFormer-T, 1 in EDAFormer-B.
        drop_path: probability in [0, 1) with which a sample skips a branch in training.
        drop_rate: probability with which a channel is dropped before the classifier in training.

    Raises:
        ValueError: if there are other than 2 or 3 maps, or an option has not three positive entries.

    >>> maps = [torch.zeros(1, 8, 6, 9), torch.zeros(1, 16, 3, 5), torch.zeros(1, 16, 2, 3)]
    >>> EDAFormerDecoder([8, 16, 16], num_classes=4, embed_dim=8)(maps).shape
    torch.Size([1, 4, 6, 9])
    """

    LEVELS = 3
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^attn(\d)(\d*)\.", lambda m: f"blocks.{int(m[1]) - 2}.{len(m[2])}."),  # attn444: the third of level 4
            (r"\.attn\.sr\.", ".mixer.kv."),
            (r"\.attn\.norm\.", ".mixer.kv_norm."),
            (r"\.attn\.", ".mixer."),
            (r"\.dwconv\.dwconv\.", ".dwconv."),
            (r"^linear_fuse\.", "fuse."),
            (r"^linear_pred\.", "classifier."),
            (r"^conv_seg\.", None),  # of mmseg's base class, which nothing uses
        ]
    }

    def __init__(
        self,
        in_channels: Sequence[Positive],
        num_classes: Positive,
        *,
        embed_dim: int = 128,
        depths: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (2, 4, 8),
        reductions: Sequence[int] = (4, 2, 1),
        isr: Sequence[int] = (1, 1, 1),
        mlp_ratio: float = 2.0,
        drop_path: float = 0.1,
        drop_rate: float = 0.1,
    ):
        super().__init__(in_channels, num_classes)
        options = {"depths": depths, "num_heads": num_heads, "reductions": reductions, "isr": isr}
        for name, values in options.items():
            if len(values) != self.LEVELS or min(values) < 1:
                raise ValueError(f"EDAFormerDecoder: {name} must be three positive integers, got {name}={values!r}")
        if embed_dim < 1 or mlp_ratio <= 0:
            raise ValueError(
                f"EDAFormerDecoder: embed_dim must be 1 or more and mlp_ratio positive, got {embed_dim=}, {mlp_ratio=}"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"EDAFormerDecoder: drop_path must be from 0 to 1, without 1, got {drop_path=}")
        first = self.LEVELS - len(in_channels)
        levels = zip(in_channels, *(values[first:] for values in options.values()), strict=True)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(
                        dim,
                        EmbeddingFreeMixer(dim, math.gcd(dim, heads), reduction=side, isr=factor, key_norm=True),
                        mlp_ratio=mlp_ratio,
                        mlp_layer=ConvMlp,
                        norm_layer=LayerNorm,
                        drop_path=drop_path,
                    )
                    for _ in range(depth)
                )
            )
            for dim, depth, heads, side, factor in levels
        )
        self.fuse = conv_norm_act(sum(in_channels), embed_dim)
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(embed_dim, num_classes, 1)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        init_by_fan_out(self.blocks)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps [B, C, H, W], finest first, into logits [B, num_classes, H, W] at the size of the first."""
        self.check_maps(maps, self.in_channels)
        levels = [
            blocks(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
            for blocks, x in zip(self.blocks, maps, strict=True)
        ]
        levels = [levels[0], *(resize(x, levels[0]) for x in levels[1:])]
        return self.classifier(self.drop(self.fuse(torch.cat(levels[::-1], 1))))
