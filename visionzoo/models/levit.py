"""LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference, ICCV 2021, https://arxiv.org/abs/2104.01136.

Facts from https://github.com/facebookresearch/LeViT at 3772b8e (Apache-2.0); the code here is our own. As released:
stochastic depth is the same in every block. The authors' code takes one square image size; ours takes any, with the
bias tables resized to the map (`visionzoo.layers.mixers.levit`), and gathers the biases in every forward pass, so that
they cannot be stale. The published parameter counts are those of both heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import to_2tuple
from torch import nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import LinearNormMlp
from visionzoo.layers.heads import BatchNormHead
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.mixers.levit import LevitMixer
from visionzoo.layers.stem import conv_stem
from visionzoo.models._pyramid import Pyramid, build_stages
from visionzoo.models._registry import Published, Variant, register_family


class LeViT(Pyramid):
    """LeViT.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: attention heads of each stage; the attention that shrinks the map has `dim // key_dim` of its input.
        key_dim: width of a head's queries and keys; values are twice as wide, four times where the map shrinks.
        mlp_ratio: hidden width of the MLPs over the channels.
        img_size: image size that the bias tables are for, or (height, width); images may have any.
        distilled: have the second classifier, which learns from a teacher after `set_distilled_training()`.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of every block; the authors train the largest with 0.1, the others with 0.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    FEATURES = 3

    def __init__(
        self,
        *,
        depths: Sequence[int] = (4, 4, 4),
        embed_dims: Sequence[int] = (256, 384, 512),
        num_heads: Sequence[int] = (4, 6, 8),
        key_dim: int = 32,
        mlp_ratio: float = 2.0,
        img_size: int | tuple[int, int] = 224,
        distilled: bool = True,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        height, width = to_2tuple(img_size)
        # sizes of the stages' maps, rounded up at every step
        maps = [(-(-height // (16 * 2**i)), -(-width // (16 * 2**i))) for i in range(len(depths))]
        # every block and transition has the same rate, and no norms but those of mixer and MLP
        block = partial(
            Block,
            mlp_ratio=mlp_ratio,
            norm_layer=nn.Identity,
            act_layer=nn.Hardswish,
            mlp_layer=LinearNormMlp,
        )

        levit = {"type": "levit", "zero_init": True}

        def shrink(in_dim: int, out_dim: int, map_size: tuple[int, int]) -> nn.Module:
            attention = LevitMixer(
                in_dim, in_dim // key_dim, key_dim=key_dim, attn_ratio=4, map_size=map_size, stride=2, out_dim=out_dim
            )
            return nn.Sequential(attention, block(out_dim, None, drop_path=drop_path_rate))

        stem_dims = [embed_dims[0] // ratio for ratio in (8, 4, 2, 1)]
        super().__init__(
            stem=conv_stem(in_chans, stem_dims, 3, (2, 2, 2, 2), nn.Hardswish, last_act=False),
            stages=build_stages(
                embed_dims,
                depths,
                [None] * len(depths),
                resolve_mixers(
                    [
                        [{"num_heads": heads, "map_size": map_size, "key_dim": key_dim, **levit}]
                        for heads, map_size in zip(num_heads, maps, strict=True)
                    ],
                    mixers,
                ),
                downsample=[partial(shrink, map_size=map_size) for map_size in maps[:-1]],
                block=lambda dim, mixer, drop_path: block(dim, mixer, drop_path=drop_path_rate),
            ),
            embed_dims=embed_dims,
            reduction=16,
            head_layer=partial(BatchNormHead, distilled=distilled),
            in_chans=in_chans,
            **head,
        )
        self.depths = tuple(depths)

    @property
    def CHECKPOINT_KEYS(self) -> dict[str, list[tuple[str, Any]]]:  # type: ignore[override]
        """Tables of names; the authors' depend on the depths."""
        return {"authors": _authors_keys(self.depths), "timm": _TIMM_KEYS}

    def init_weights(self) -> None:
        """Leave torch's initial values to the linear layers, which batch norms follow; the head has its own."""


_COMMON_KEYS = [
    (r"attention_bias_idxs$", None),
    (r"\.attention_biases$", ".bias_table"),
    (r"^head\.(linear|l)\.", "head.fc."),
    (r"^head_dist\.(linear|l)\.", "head.fc_dist."),
    (r"^head_dist\.bn\.", "head.norm_dist."),
    (r"\.(proj|q)\.(1|ln)\.", r".\1."),
    (r"\.c\.", ".linear."),
    (r"\.bn\.", ".norm."),
]
_TIMM_KEYS = [
    (r"^stem\.conv([1-4])\.linear\.", lambda m: f"stem.{2 * (int(m[1]) - 1)}.conv."),
    (r"^stem\.conv([1-4])\.", lambda m: f"stem.{2 * (int(m[1]) - 1)}."),
    (r"\.downsample\.attn_downsample\.", ".downsample.0."),
    (r"\.downsample\.mlp\.", ".downsample.1.mlp."),
    (r"\.attn\.", ".mixer."),
    (r"\.mlp\.ln([12])\.", r".mlp.fc\1."),
    *_COMMON_KEYS,
]


def _authors_keys(depths: Sequence[int]) -> list[tuple[str, Any]]:
    """Map the authors' names, which count attentions and MLPs through all stages, those of the transitions too."""
    places: list[str] = []
    for i, depth in enumerate(depths):
        if i:
            places += [f"stages.{i}.downsample.0.", f"stages.{i}.downsample.1.mlp."]
        places += [f"stages.{i}.blocks.{j}.{part}." for j in range(depth) for part in ("mixer", "mlp")]
    return [
        (r"^patch_embed\.(\d)\.c\.", r"stem.\1.conv."),
        (r"^patch_embed\.", "stem."),
        (r"^blocks\.(\d+)\.(?:m\.)?", lambda m: places[int(m[1])] if int(m[1]) < len(places) else m[0]),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.2\.", ".mlp.fc2."),
        *_COMMON_KEYS,
    ]


def _weights(size: str) -> dict[str, Any]:
    return {"tag": "fb_dist_in1k", "hf_hub_id": f"timm/levit_{size}.fb_dist_in1k"}


_README = "README.md of facebookresearch/LeViT, distilled from RegNetY-16GF"

VARIANTS = {
    "zoo_levit_128s": Variant(
        {"depths": (2, 3, 4), "embed_dims": (128, 256, 384), "num_heads": (4, 6, 8), "key_dim": 16},
        Published(7.8, 0.305, 76.6, source=_README),
        _weights("128s"),
    ),
    "zoo_levit_128": Variant(
        {"embed_dims": (128, 256, 384), "num_heads": (4, 8, 12), "key_dim": 16},
        Published(9.2, 0.406, 78.6, source=_README),
        _weights("128"),
    ),
    "zoo_levit_192": Variant(
        {"embed_dims": (192, 288, 384), "num_heads": (3, 5, 6)},
        Published(11, 0.658, 80.0, source=_README),
        _weights("192"),
    ),
    "zoo_levit_256": Variant(
        {"embed_dims": (256, 384, 512), "num_heads": (4, 6, 8)},
        Published(19, 1.12, 81.6, source=_README),
        _weights("256"),
    ),
    "zoo_levit_384": Variant(
        {"embed_dims": (384, 512, 768), "num_heads": (6, 9, 12)},
        Published(39, 2.353, 82.6, source=_README),
        _weights("384"),
    ),
}

TINY = {"zoo_levit_128s": {"depths": (1, 1, 1), "embed_dims": (16, 16, 24), "num_heads": (1, 2, 3), "key_dim": 8}}

register_family(
    __name__,
    LeViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    classifier=("head.fc", "head.fc_dist"),
    pool_size=(4, 4),
    crop_pct=0.9,  # timm's; the authors' code evaluates at 0.875
    paper_ids="arXiv:2104.01136",
    origin_url="https://github.com/facebookresearch/LeViT",
    license="apache-2.0",
)
