"""CSWin Transformer: cross-shaped windows, CVPR 2022, https://arxiv.org/abs/2107.00652.

Facts from https://github.com/microsoft/CSWin-Transformer at f111ae2 (MIT license); the code here is our own. Their
classifier takes one image size; maps that the stripes do not divide are treated as in their segmentation backbone
(zeros on both sides of q, k and v, not masked). Of the published counts the tiny model's 23 M parameters are 22.3 M in
the authors' own code, and the large model's 31.5 and 96.8 GMACs are 33.1 and 101.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import ConvNormStem
from visionzoo.models._pyramid import Pyramid, build_stages, doubling
from visionzoo.models._registry import Published, Variant, register_family


class CSWinTransformer(Pyramid):
    """CSWin Transformer.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        stripe_widths: width of the stripes in tokens, for each stage; None for one window, the whole map.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^norm\d\.", None),  # of the maps, in their segmentation backbone
            (r"^stage1_conv_embed\.0\.", "stem.conv."),
            (r"^stage1_conv_embed\.2\.", "stem.norm."),
            (r"^merge(\d)\.", r"stages.\1.downsample."),
            (r"^stage(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
            (r"\.(qkv|proj)\.", r".mixer.\1."),
            (r"\.attns\.(\d)\.get_v\.", r".mixer.lepe.\1."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 2, 21, 1),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stripe_widths: Sequence[int | None] = (1, 2, 7, None),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        cross = {"type": "cross_window", "qkv_bias": qkv_bias}
        super().__init__(
            stem=ConvNormStem(in_chans, embed_dims[0], 7, 4, 2, norm_layer=LayerNorm),
            stages=build_stages(
                embed_dims,
                depths,
                num_heads,
                resolve_mixers([[{**cross, "stripe_width": width}] for width in stripe_widths], mixers),
                downsample=partial(ConvNorm, kernel_size=3, stride=2, padding=1, norm_layer=LayerNorm),
                block=partial(Block, mlp_ratio=mlp_ratio, norm_layer=LayerNorm),
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            norm=LayerNorm(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )


def _no_weights(name: str) -> str:
    url = "https://github.com/microsoft/CSWin-Transformer/releases/download/v0.1.0"
    return f"timm has none; the authors' are at {url}/cswin_{name}.pth"


_README = "README.md of microsoft/CSWin-Transformer"
_README_22K = f"{_README}, pre-trained on ImageNet-22K"
_DEPTHS = (2, 4, 32, 2)
_BASE, _LARGE = doubling(96, _DEPTHS, (4, 8, 16, 32)), doubling(144, _DEPTHS, (6, 12, 24, 24))
_WIDE_STRIPES = {"stripe_widths": (1, 2, 12, None)}
_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

VARIANTS = {
    "zoo_cswin_t": Variant(
        doubling(64, (1, 2, 21, 1), (2, 4, 8, 16)),
        Published(23, 4.3, 82.8, source=_README, explained=("params_m",)),
        no_weights=_no_weights("tiny_224"),
    ),
    "zoo_cswin_s": Variant(
        doubling(64, _DEPTHS, (2, 4, 8, 16)),
        Published(35, 6.9, 83.6, source=_README),
        no_weights=_no_weights("small_224"),
    ),
    "zoo_cswin_b": Variant(_BASE, Published(78, 15.0, 84.2, source=_README), no_weights=_no_weights("base_224")),
    "zoo_cswin_b_384": Variant(
        {**_BASE, **_WIDE_STRIPES},
        Published(78, 47.0, 85.5, 384, _README),
        _AT_384,
        no_weights=_no_weights("base_384"),
    ),
    "zoo_cswin_l": Variant(
        _LARGE,
        Published(173, 31.5, 86.5, source=_README_22K, explained=("gmacs",)),
        no_weights=_no_weights("large_224"),
    ),
    "zoo_cswin_l_384": Variant(
        {**_LARGE, **_WIDE_STRIPES},
        Published(173, 96.8, 87.5, 384, _README_22K, explained=("gmacs",)),
        _AT_384,
        no_weights=_no_weights("large_384"),
    ),
}

TINY = {"zoo_cswin_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (2, 2, 4, 4)}}

register_family(
    __name__,
    CSWinTransformer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    crop_pct=0.9,
    paper_ids="arXiv:2107.00652",
    origin_url="https://github.com/microsoft/CSWin-Transformer",
    license="mit",
)
