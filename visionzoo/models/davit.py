"""DaViT: Dual Attention Vision Transformers, ECCV 2022, https://arxiv.org/abs/2204.03645.

Facts from https://github.com/dingmyu/davit at fc79470 (MIT license) and, for the large, huge and giant sizes, from timm
1.0.31 (Apache-2.0); the code here is our own. A block of theirs is a pair: we count its window half and its channel
half as a block each. As released: padding to whole windows comes after the norm and takes part in attention; inputs
of stem and downsampling are padded to whole patches. Like timm we default to windows of 7 tokens at every size.
The published GMACs of the three are those of windows of 12 at 384 px and 16 at 512 px: `window_size=12` gives the large
one 102.8 (`zoo_davit_l_384`, as their code names it), 16 gives the huge and giant ones 326 and 1020; with 7 they have
105.4, 328.7 and 1042.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import LayerNorm2d, NormMlpClassifierHead

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import ConvNormStem
from visionzoo.models._pyramid import Pyramid, build_stages, doubling
from visionzoo.models._registry import Published, Variant, register_family

_MIXER_OF_PAIR = {"spatial_block": 0, "channel_block": 1, "0": 0, "1": 1}


def _flatten_pair(match) -> str:
    stage, pair, half = match.groups()
    return f"stages.{stage}.blocks.{2 * int(pair) + _MIXER_OF_PAIR[half]}."


class DaViT(Pyramid):
    """DaViT.

    Args:
        depths: blocks of each stage, window and channel attention in turn (twice the paper's count of pairs).
        embed_dims: channels of each stage.
        num_heads: heads of both attentions for each stage.
        window_size: side of the windows, in tokens.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        overlap: downsample by patches of 3×3, not 2×2; those of the stem overlap in any case.
        mask_padding: leave padded tokens out of window attention.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    POOLS = ("", "avg", "max", "avgmax")  # the norm behind the pooling has the width of the map

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^norm\d\.", None),  # of the maps, in their dense backbones
            (r"^patch_embeds\.0\.proj\.", "stem.conv."),
            (r"^patch_embeds\.0\.norm\.", "stem.norm."),
            (r"^patch_embeds\.(\d)\.proj\.", r"stages.\1.downsample.conv."),
            (r"^patch_embeds\.(\d)\.norm\.", r"stages.\1.downsample.norm."),
            (r"^main_blocks\.(\d)\.(\d+)\.([01])\.", _flatten_pair),
            (r"\.cpe\.0\.proj\.", ".cpe1."),
            (r"\.cpe\.1\.proj\.", ".cpe2."),
            (r"\.attn\.", ".mixer."),
            (r"^norms\.", "head.norm."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
        "timm": [
            (r"^stages\.(\d)\.blocks\.(\d+)\.([01]|spatial_block|channel_block)\.", _flatten_pair),
            (r"\.cpe([12])\.proj\.", r".cpe\1."),
            (r"\.attn\.", ".mixer."),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        overlap: bool = False,
        mask_padding: bool = False,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        window = {
            "type": "window",
            "window_size": window_size,
            "qkv_bias": qkv_bias,
            "mask_padding": mask_padding,
        }
        channel = {"type": "channel", "qkv_bias": qkv_bias}
        super().__init__(
            stem=ConvNormStem(in_chans, embed_dims[0], 7, 4, 3, norm_layer=LayerNorm, pad_to_stride=True),
            stages=build_stages(
                embed_dims,
                depths,
                num_heads,
                resolve_mixers([[window, channel]] * len(depths), mixers),
                downsample=partial(
                    ConvNorm,
                    kernel_size=3 if overlap else 2,
                    stride=2,
                    padding=int(overlap),
                    norm_layer=LayerNorm,
                    norm_first=True,
                    pad_to_stride=True,
                ),
                block=partial(
                    Block,
                    mlp_ratio=mlp_ratio,
                    norm_layer=LayerNorm,
                    cpe_kernels=(3, 3),
                    cpe_layer=DepthwiseConvNHWC,
                ),
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            head_layer=partial(NormMlpClassifierHead, norm_layer=partial(LayerNorm2d, eps=1e-5)),
            in_chans=in_chans,
            **head,
        )


def _timm_weights(size: str) -> dict[str, Any]:
    return {"tag": "msft_in1k", "hf_hub_id": f"timm/davit_{size}.msft_in1k"}


_README = "README.md of dingmyu/davit"
_COPY = "README.md of leondgarse/keras_cv_attention_models (copy of the paper's; pre-trained on other data)"
_UNRELEASED = "the authors did not release their classification weights of this size"
_SMALL, _GIANT = (2, 2, 18, 2), (2, 2, 24, 6)

VARIANTS = {
    "zoo_davit_t": Variant(
        doubling(96, (2, 2, 6, 2)), Published(28.3, 4.5, 82.8, source=_README), _timm_weights("tiny")
    ),
    "zoo_davit_s": Variant(doubling(96, _SMALL), Published(49.7, 8.8, 84.2, source=_README), _timm_weights("small")),
    "zoo_davit_b": Variant(doubling(128, _SMALL), Published(87.9, 15.5, 84.6, source=_README), _timm_weights("base")),
    "zoo_davit_l": Variant(
        doubling(192, _SMALL), Published(196.8, 103.0, 87.5, 384, _COPY, ("gmacs",)), no_weights=_UNRELEASED
    ),
    "zoo_davit_l_384": Variant(
        {**doubling(192, _SMALL), "window_size": 12},
        Published(196.8, 103.0, 87.5, 384, _COPY),
        {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0},
        no_weights=_UNRELEASED,
    ),
    "zoo_davit_h": Variant(doubling(256, _SMALL), Published(348.9, 327.3, 90.2, 512, _COPY), no_weights=_UNRELEASED),
    "zoo_davit_g": Variant(
        doubling(384, _GIANT), Published(1406.0, 1022.0, 90.4, 512, _COPY, ("gmacs",)), no_weights=_UNRELEASED
    ),
}

TINY = {"zoo_davit_t": {"depths": (2, 1, 1, 2), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}}

register_family(
    __name__,
    DaViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    crop_pct=0.95,  # timm's; the authors evaluate at 0.9
    paper_ids="arXiv:2204.03645",
    origin_url="https://github.com/dingmyu/davit",
    license="mit",
)
