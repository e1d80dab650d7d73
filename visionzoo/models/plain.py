"""The network that papers on token mixers put theirs into: DeiT (arXiv:2012.12877), of which timm has the variants."""

from __future__ import annotations

from functools import partial
from typing import Any

from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._isotropic import Isotropic, build_blocks


class PlainTransformer(Isotropic):
    """Patches, a class token, learned positions, pre-norm blocks, a norm.

    A subclass names its mixer, which takes `qkv_bias`, in `MIXER`.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        class_token: have a class token.
        reg_tokens: number of register tokens beside it.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    MIXER = "full"
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^patch_embed\.proj\.", "stem.conv."),
            (r"^pos_embed$", "positions.table"),
            (r"^cls_token$", "prefix.cls_token"),
            (r"\.attn\.", ".mixer."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
    }

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 192,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        reg_tokens: int = 0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        norm = partial(LayerNorm, eps=1e-6)
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [{"type": self.MIXER, "qkv_bias": qkv_bias}] * depth,
                mixers,
                block=partial(TokenBlock, mlp_ratio=mlp_ratio, norm_layer=norm),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            class_token=class_token,
            reg_tokens=reg_tokens,
            norm=norm(embed_dim),
            in_chans=in_chans,
            **head,
        )
