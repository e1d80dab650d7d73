"""PVTv2: Improved Baselines with Pyramid Vision Transformer, https://arxiv.org/abs/2106.13797.

Facts from https://github.com/whai362/PVT at 57e2dfa (Apache-2.0); the code here is our own. As released: a norm ends
every stage, so that features are normalized; where attention's keys come from patches of tokens, rows and columns after
the last whole patch have no part in them. B0's 0.57 GMACs are published as 0.6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.mlp import ConvMlp
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import ConvNormStem
from visionzoo.models._pyramid import Pyramid, build_stages
from visionzoo.models._registry import Published, Variant, register_family


class PyramidVisionTransformerV2(Pyramid):
    """PVTv2.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        mlp_ratios: hidden width of the MLPs over the channels, for each stage.
        reductions: side of the patches that attention's keys come from, for each stage.
        linear: the layout of PVTv2-B2-Linear: keys from a map pooled to 7×7, a ReLU before the MLPs' convolutions.
        mlp_relu: whether the MLPs have that ReLU; None means as `linear` says.
        mlp_gated: whether a second map gates the MLPs' convolved one (TransNeXt).
        qkv_bias: whether the projections to q, k, v have a bias.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^patch_embed1\.proj\.", "stem.conv."),
            (r"^patch_embed1\.norm\.", "stem.norm."),
            (r"^patch_embed(\d)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv."),
            (r"^patch_embed(\d)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm."),
            (r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
            (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
            (r"\.attn\.sr\.", ".mixer.sr.conv."),
            (r"\.attn\.norm\.", ".mixer.sr.norm."),
            (r"\.attn\.", ".mixer."),
            (r"\.dwconv\.dwconv\.", ".dwconv."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
        "timm": [
            (r"^patch_embed\.proj\.", "stem.conv."),
            (r"^patch_embed\.norm\.", "stem.norm."),
            (r"\.downsample\.proj\.", ".downsample.conv."),
            (r"\.attn\.sr\.", ".mixer.sr.conv."),
            (r"\.attn\.norm\.", ".mixer.sr.norm."),
            (r"\.attn\.", ".mixer."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        reductions: Sequence[int] = (8, 4, 2, 1),
        linear: bool = False,
        mlp_relu: bool | None = None,
        mlp_gated: bool = False,
        qkv_bias: bool = True,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        own = [
            [
                {
                    "type": "spatial_reduction",
                    **({"pool_size": 7} if linear else {"reduction": ratio}),
                    "qkv_bias": qkv_bias,
                }
            ]
            for ratio in reductions
        ]
        norm = partial(LayerNorm, eps=1e-6)
        relu = nn.ReLU if (linear if mlp_relu is None else mlp_relu) else None
        mlp = partial(ConvMlp, first_act_layer=relu, gated=mlp_gated)
        super().__init__(
            stem=ConvNormStem(in_chans, embed_dims[0], 7, 4, 3, norm_layer=LayerNorm),
            stages=build_stages(
                embed_dims,
                depths,
                num_heads,
                resolve_mixers(own, mixers),
                downsample=partial(ConvNorm, kernel_size=3, stride=2, padding=1, norm_layer=LayerNorm),
                block=[partial(Block, mlp_ratio=ratio, mlp_layer=mlp, norm_layer=norm) for ratio in mlp_ratios],
                stage_norm=norm,
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            in_chans=in_chans,
            **head,
        )

    def init_weights(self) -> None:
        """Initialize as released: convolutions too, normal by their fan-out."""
        super().init_weights()
        init_by_fan_out(self)


def init_by_fan_out(model: nn.Module) -> None:
    """Draw the weights of all convolutions normally, with the variance 2 / fan-out; no bias."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | DepthwiseConvNHWC):
            groups = getattr(module, "groups", len(module.weight))
            fan_out = module.weight[0, 0].numel() * len(module.weight) // groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _weights(size: str) -> dict[str, Any]:
    return {"tag": "in1k", "hf_hub_id": f"timm/pvt_v2_{size}.in1k"}


_README = "README.md of whai362/PVT; GMACs: paper, table 2"
_B2, _B3, _B4 = (3, 4, 6, 3), (3, 4, 18, 3), (3, 8, 27, 3)

VARIANTS = {
    "zoo_pvtv2_b0": Variant(
        {"depths": (2, 2, 2, 2), "embed_dims": (32, 64, 160, 256)},
        Published(3.7, 0.6, 70.5, source=_README),
        _weights("b0"),
    ),
    "zoo_pvtv2_b1": Variant({"depths": (2, 2, 2, 2)}, Published(14.0, 2.1, 78.7, source=_README), _weights("b1")),
    "zoo_pvtv2_b2": Variant({"depths": _B2}, Published(25.4, 4.0, 82.0, source=_README), _weights("b2")),
    "zoo_pvtv2_b2_li": Variant(
        {"depths": _B2, "linear": True}, Published(22.6, 3.9, 82.1, source=_README), _weights("b2_li")
    ),
    "zoo_pvtv2_b3": Variant({"depths": _B3}, Published(45.2, 6.9, 83.1, source=_README), _weights("b3")),
    "zoo_pvtv2_b4": Variant({"depths": _B4}, Published(62.6, 10.1, 83.6, source=_README), _weights("b4")),
    "zoo_pvtv2_b5": Variant(
        {"depths": (3, 6, 40, 3), "mlp_ratios": (4.0, 4.0, 4.0, 4.0)},
        Published(82.0, 11.8, 83.8, source=_README),
        _weights("b5"),
    ),
}

TINY = {
    "zoo_pvtv2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_pvtv2_b2_li": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
}

register_family(
    __name__,
    PyramidVisionTransformerV2,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    crop_pct=0.9,  # timm's; the authors evaluate at 0.875
    paper_ids="arXiv:2106.13797",
    origin_url="https://github.com/whai362/PVT",
    license="apache-2.0",
)
