"""Flowformer: Linearizing Transformers with Conservation Flows, ICML 2022, https://arxiv.org/abs/2202.06258.

Facts from https://github.com/thuml/Flowformer at 61f5d8c (MIT), folder Flowformer_CV; the code here is our own. One
size is published. As released: attention is global in every stage, in twelve heads whatever the width, and the MLPs'
branches, and no others, have a learned scale. Where we differ: images of any size and shape are taken, with positions
interpolated and zeros where the stem and the convolutions between stages lack rows or columns. The published 41 M
parameters and 6.3 GMACs are in units of 2²⁰ and 2³⁰, the latter without attention's products; the authors' own code
has 43.3 million parameters and 6.9 billion multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

from timm.layers import to_2tuple

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.position import PositionTable
from visionzoo.layers.stem import Stem
from visionzoo.models._pyramid import Pyramid, build_stages, per_stage
from visionzoo.models._registry import Published, Variant, register_family


class Flowformer(Pyramid):
    """Flowformer.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: attention heads of each stage.
        mlp_ratio: hidden width of the MLPs over the channels; one number, or one for each stage.
        layer_scale: initial value of the learned scales of the MLPs' branches.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if there are several MLP ratios, but not one for each stage.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^pos_embed$", "stem.1.table"),
            (r"^patch_embed\.0\.proj\.", "stem.0.conv."),
            (r"^patch_embed\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
            (r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.attn\.", ".mixer."),
            (r"\.gamma$", ".ls2.gamma"),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ]
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 10, 3),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (12, 12, 12, 12),
        mlp_ratio: float | Sequence[float] = 4.0,
        layer_scale: float = 1e-5,
        img_size: int | tuple[int, int] = 224,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        norm = partial(LayerNorm, eps=1e-6)
        height, width = to_2tuple(img_size)
        ratios = per_stage(type(self).__name__, depths, mlp_ratio=mlp_ratio)
        super().__init__(
            stem=Stem(
                ConvNorm(in_chans, embed_dims[0], 4, 4, pad_to_stride=True),
                PositionTable(embed_dims[0], (ceil(height / 4), ceil(width / 4))),
            ),
            stages=build_stages(
                embed_dims,
                depths,
                num_heads,
                resolve_mixers([[{"type": "flow"}]] * len(depths), mixers),
                downsample=partial(ConvNorm, kernel_size=2, stride=2, pad_to_stride=True),
                block=[partial(Block, mlp_ratio=x, norm_layer=norm, layer_scale=(None, layer_scale)) for x in ratios],
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            norm=norm(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )


VARIANTS = {
    "zoo_flowformer": Variant(
        {},
        Published(41, 6.3, 80.6, source="pic/CV_results.png of thuml/Flowformer", explained=("params_m", "gmacs")),
        no_weights="the authors' are on cloud.tsinghua.edu.cn, which needs a browser",
    )
}

TINY = {"zoo_flowformer": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (2, 2, 4, 4)}}

register_family(
    __name__,
    Flowformer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    paper_ids="arXiv:2202.06258",
    origin_url="https://github.com/thuml/Flowformer",
    license="mit",
)
