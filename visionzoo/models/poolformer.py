"""PoolFormer: MetaFormer Is Actually What You Need for Vision, CVPR 2022, https://arxiv.org/abs/2111.11418.

Facts from https://github.com/sail-sg/poolformer at a075575 (Apache-2.0); the code here is our own. As the authors' and
unlike timm's `poolformer_*` the last map is normalized over channels and positions before it is pooled. timm's weights
are the authors' and load here, but give the authors' logits, not timm's. Norms of the maps that only their detection
and segmentation backbones have (`norm0` to `norm6`) are left out when those checkpoints are loaded: `out_norm` of the
detection configs is their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.nhwc import GroupNorm1
from visionzoo.layers.stem import ConvNormStem
from visionzoo.models._pyramid import Pyramid, build_stages
from visionzoo.models._registry import Published, Variant, register_family


class PoolFormer(Pyramid):
    """PoolFormer.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        pool_size: side of the pooled neighborhood, odd.
        mlp_ratio: hidden width of the MLPs over the channels.
        layer_scale: initial value of the learned scales of both branches.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^norm\d\.", None),
            (r"^patch_embed\.proj\.", "stem.conv."),
            (r"^network\.([135])\.proj\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.conv."),
            (r"^network\.([0246])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
            (r"\.layer_scale_([12])$", r".ls\1.gamma"),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
        "timm": [
            (r"\.layer_scale([12])\.scale$", r".ls\1.gamma"),
            (r"^head\.norm\.", "norm."),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        pool_size: int = 3,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        super().__init__(
            stem=ConvNormStem(in_chans, embed_dims[0], 7, 4, 2),
            stages=build_stages(
                embed_dims,
                depths,
                [None] * len(depths),
                resolve_mixers([[{"type": "pool", "pool_size": pool_size}]] * len(depths), mixers),
                downsample=partial(ConvNorm, kernel_size=3, stride=2, padding=1),
                block=partial(Block, mlp_ratio=mlp_ratio, norm_layer=GroupNorm1, layer_scale=layer_scale),
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            norm=GroupNorm1(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )


def _weights(size: str, crop_pct: float) -> dict[str, Any]:
    return {"tag": "sail_in1k", "hf_hub_id": f"timm/poolformer_{size}.sail_in1k", "crop_pct": crop_pct}


_README = "README.md of sail-sg/poolformer"
_S36, _M48 = (6, 6, 18, 6), (8, 8, 24, 8)
_M = {"embed_dims": (96, 192, 384, 768), "layer_scale": 1e-6}

VARIANTS = {
    "zoo_poolformer_s12": Variant(
        {"depths": (2, 2, 6, 2)}, Published(12, 1.8, 77.2, source=_README), _weights("s12", 0.9)
    ),
    "zoo_poolformer_s24": Variant(
        {"depths": (4, 4, 12, 4)}, Published(21, 3.4, 80.3, source=_README), _weights("s24", 0.9)
    ),
    "zoo_poolformer_s36": Variant(
        {"depths": _S36, "layer_scale": 1e-6}, Published(31, 5.0, 81.4, source=_README), _weights("s36", 0.9)
    ),
    "zoo_poolformer_m36": Variant(
        {"depths": _S36, **_M}, Published(56, 8.8, 82.1, source=_README), _weights("m36", 0.95)
    ),
    "zoo_poolformer_m48": Variant(
        {"depths": _M48, **_M}, Published(73, 11.6, 82.5, source=_README), _weights("m48", 0.95)
    ),
}

TINY = {"zoo_poolformer_s12": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24)}}

register_family(
    __name__,
    PoolFormer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    paper_ids="arXiv:2111.11418",
    origin_url="https://github.com/sail-sg/poolformer",
    license="apache-2.0",
)
