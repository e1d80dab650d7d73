"""Twins-PCPVT: the pyramid of PVT with conditional positions, NeurIPS 2021, https://arxiv.org/abs/2104.13840.

Facts from gvt.py of https://github.com/Meituan-AutoML/Twins at c1ff671 (Apache-2.0), where the class is CPVTV2; the
code here is our own. As released: a position generator (CPVT, arXiv:2102.10882) follows the first block of each stage,
instead of PVT's tables and class token; the head pools the normalized map; rows and columns after the last whole
patch are dropped. The authors' own code has 3.8, 6.7 and 9.8 GMACs, attention's products counted, not the published
3.7, 6.4 and 9.5.
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
from visionzoo.models._positions import add_position_generators
from visionzoo.models._pyramid import Pyramid, build_stages
from visionzoo.models._registry import Published, Variant, register_family


class ConditionalPyramid(Pyramid):
    """Twins-PCPVT.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        mlp_ratios: hidden width of the MLPs over the channels, for each stage.
        reductions: side of the patches that attention's keys come from, for each stage.
        qkv_bias: whether the projections to q, k, v have a bias.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^patch_embeds\.0\.proj\.", "stem.conv."),
            (r"^patch_embeds\.0\.norm\.", "stem.norm."),
            (r"^patch_embeds\.(\d)\.proj\.", r"stages.\1.downsample.conv."),
            (r"^patch_embeds\.(\d)\.norm\.", r"stages.\1.downsample.norm."),
            (r"^blocks\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"^pos_block\.(\d)\.proj\.0\.", r"stages.\1.blocks.0.peg."),
            (r"\.attn\.sr\.", ".mixer.sr.conv."),
            (r"\.attn\.norm\.", ".mixer.sr.norm."),
            (r"\.attn\.", ".mixer."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        reductions: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        own = [[{"type": "spatial_reduction", "reduction": ratio, "qkv_bias": qkv_bias}] for ratio in reductions]
        norm = partial(LayerNorm, eps=1e-6)
        super().__init__(
            stem=ConvNormStem(in_chans, embed_dims[0], 4, 4, norm_layer=LayerNorm),
            stages=build_stages(
                embed_dims,
                depths,
                num_heads,
                resolve_mixers(own, mixers),
                downsample=partial(ConvNorm, kernel_size=2, stride=2, norm_layer=LayerNorm),
                block=[partial(Block, mlp_ratio=ratio, norm_layer=norm) for ratio in mlp_ratios],
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            norm=norm(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )
        add_position_generators(self)


def _weights(size: str) -> dict[str, Any]:
    return {"tag": "in1k", "hf_hub_id": f"timm/twins_pcpvt_{size}.in1k"}


_README = "README.md of Meituan-AutoML/Twins"

VARIANTS = {
    "zoo_pcpvt_s": Variant({}, Published(24.1, 3.7, 81.2, source=_README, explained=("gmacs",)), _weights("small")),
    "zoo_pcpvt_b": Variant(
        {"depths": (3, 4, 18, 3)}, Published(43.8, 6.4, 82.7, source=_README, explained=("gmacs",)), _weights("base")
    ),
    "zoo_pcpvt_l": Variant(
        {"depths": (3, 8, 27, 3)}, Published(60.9, 9.5, 83.1, source=_README, explained=("gmacs",)), _weights("large")
    ),
}

TINY = {"zoo_pcpvt_s": {"depths": (1, 2, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}}

register_family(
    __name__,
    ConditionalPyramid,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    crop_pct=0.9,
    paper_ids="arXiv:2104.13840",
    origin_url="https://github.com/Meituan-AutoML/Twins",
    license="apache-2.0",
)
