"""FaViT: Factorization Vision Transformer, Modeling Long Range Dependency with Local Window Cost, AAAI 2024.

Paper: https://arxiv.org/abs/2312.08614.

Facts from https://github.com/q2479036243/FaViT at 529b46b, which states no license; the code here is our own. PVTv2
with factorized self-attention and other MLP ratios. Where a map is too small for the authors' reflection, it is
reflected repeatedly. Of the published counts B1's 2.4 GMACs are 2.3 here, and B2's 24 M parameters are 24.9 M, in the
authors' own code too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visionzoo.layers.mixers import combine_mixers
from visionzoo.models._registry import Published, Variant, register_family
from visionzoo.models.pvtv2 import PyramidVisionTransformerV2


class FaViT(PyramidVisionTransformerV2):
    """FaViT.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads of the local channels, for each stage.
        mlp_ratios: hidden width of the MLPs over the channels, for each stage.
        reductions: side of the patches that global keys come from, and step inside the wide windows, for each stage.
        qkv_bias: whether the linear layers before attention have a bias.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        others: `in_chans`, `drop_path_rate`, and the head's, as `PyramidVisionTransformerV2` takes them.
    """

    DYNAMIC_SIZE = False  # the number of windows steers the average over them
    CHECKPOINT_KEYS = {
        "authors": [
            (r"\.attn\.kv_g\.", ".mixer.global_kv."),
            (r"\.attn\.local_conv_g\.", ".mixer.global_conv."),
            (r"\.attn\.kv_l\.depth_conv\.", ".mixer.local_kv.0."),
            (r"\.attn\.kv_l\.point_conv\.", ".mixer.local_kv.1."),
            (r"\.attn\.fcs\.", ".mixer.local_fc1."),
            (r"\.attn\.single_heads\.", ".mixer.local_fc2."),
            (r"\.attn\.local_convs\.", ".mixer.local_conv."),
            *PyramidVisionTransformerV2.CHECKPOINT_KEYS["authors"],
        ]
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (8.0, 6.0, 4.0, 4.0),
        reductions: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        mixers: Any = None,
        **others: Any,
    ):
        own = [[{"type": "factorized", "reduction": reduction, "qkv_bias": qkv_bias}] for reduction in reductions]
        super().__init__(
            depths=depths,
            embed_dims=embed_dims,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            reductions=reductions,
            qkv_bias=qkv_bias,
            mixers=combine_mixers(own, mixers),
            **others,
        )


_README = "README.md of q2479036243/FaViT"

VARIANTS = {
    "zoo_favit_b0": Variant({"embed_dims": (32, 64, 128, 256)}, Published(3.4, 0.6, 71.5, source=_README)),
    "zoo_favit_b1": Variant({}, Published(13, 2.4, 79.4, source=_README, explained=("gmacs",))),
    "zoo_favit_b2": Variant(
        {"depths": (2, 3, 18, 3)}, Published(24, 4.5, 82.3, source=_README, explained=("params_m",))
    ),
    "zoo_favit_b3": Variant(
        {"depths": (2, 3, 14, 3), "embed_dims": (96, 192, 384, 768)}, Published(48, 8.5, 83.4, source=_README)
    ),
}

TINY = {"zoo_favit_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}}

register_family(
    __name__,
    FaViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    paper_ids="arXiv:2312.08614",
    origin_url="https://github.com/q2479036243/FaViT",
    license="unknown",
)
