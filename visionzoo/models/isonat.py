"""Isotropic NAT and DiNAT, and a ViT with relative positions beside them, https://arxiv.org/abs/2209.15001.

Facts from https://github.com/SHI-Labs/Neighborhood-Attention-Transformer at d334f5b (MIT license); the code here is our
own. Patches of 16 px with a norm stay tokens of one width; positions are only those relative ones of attention, and
there is no class token. ViT-rpb, which attends to all tokens of a 224 px image, is the same network with a neighborhood
as large as that map.

Where we differ: images of any size and shape are taken, with the neighborhood as it is; maps smaller than that are
padded (see `NeighborhoodMixer`). The authors' code takes square images of the size that it is built for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import ConvNormStem
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._isotropic import Isotropic, build_blocks
from visionzoo.models._registry import Published, Variant, register_family


class IsoNAT(Isotropic):
    """Transformer of one width with neighborhood attention.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: attention heads.
        kernel_size: neighbors along an axis, or (vertical, horizontal).
        dilation: step from neighbor to neighbor in every second block.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        patch_size: side of the patches in pixels.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"\.relative_position_index$", None),
            (r"^patch_embed\.proj\.", "stem.conv."),
            (r"^patch_embed\.norm\.", "stem.norm."),
            (r"^layers\.", "blocks."),
            (r"\.attn\.rpb$", ".mixer.relative_position_bias.table"),
            (r"\.attn\.", ".mixer."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ]
    }

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 384,
        num_heads: int = 12,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_size: int = 16,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        own = {"type": "neighborhood", "kernel_size": kernel_size, "qkv_bias": qkv_bias}
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [{**own, "dilation": dilation if i % 2 else 1} for i in range(depth)],
                mixers,
                block=partial(TokenBlock, mlp_ratio=mlp_ratio),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            stem=ConvNormStem(in_chans, embed_dim, patch_size, patch_size, norm_layer=LayerNorm, pad_to_stride=True),
            class_token=False,
            positions="none",
            norm=LayerNorm(embed_dim),
            in_chans=in_chans,
            **head,
        )


_URL = "https://shi-labs.com/projects/dinat/checkpoints/isotropic"
_README = "DiNAT.md of SHI-Labs/Neighborhood-Attention-Transformer"
_FORMS: dict[str, tuple[str, dict[str, Any]]] = {  # the authors' name -> ours, arguments
    "nat_isotropic": ("isonat", {}),
    "dinat_isotropic": ("isodinat", {"dilation": 2}),
    "vitrpb": ("vitrpb", {"kernel_size": 14}),
}
_SIZES: dict[str, dict[str, Any]] = {"small": {}, "base": {"embed_dim": 768, "num_heads": 24}}
_PUBLISHED = {  # parameters, multiply-adds, top-1
    ("nat_isotropic", "small"): (22, 4.3, 80.0),
    ("dinat_isotropic", "small"): (22, 4.3, 80.8),
    ("vitrpb", "small"): (22, 4.6, 81.2),
    ("nat_isotropic", "base"): (86, 16.9, 81.6),
    ("dinat_isotropic", "base"): (86, 16.9, 82.1),
    ("vitrpb", "base"): (86, 17.5, 82.5),
}

VARIANTS = {
    f"zoo_{_FORMS[form][0]}_{size[0]}": Variant(
        {**_FORMS[form][1], **_SIZES[size]},
        Published(*numbers, source=_README),
        no_weights=f"the authors' are at {_URL}/{form}_{size}_in1k_224.pth",
    )
    for (form, size), numbers in _PUBLISHED.items()
}

_SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 16, "num_heads": 2, "kernel_size": 3}
TINY = {"zoo_isodinat_s": _SMALL, "zoo_vitrpb_s": {**_SMALL, "kernel_size": 4}}

register_family(
    __name__,
    IsoNAT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    paper_ids="arXiv:2209.15001",
    origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    license="mit",
)
