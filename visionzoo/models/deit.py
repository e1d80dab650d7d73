"""DeiT: Training data-efficient image transformers & distillation through attention, https://arxiv.org/abs/2012.12877.

ICML 2021. Facts from https://github.com/facebookresearch/deit at 7e160fe (Apache-2.0); the code here is our own. It is
the plain transformer that papers on mixers and on fewer tokens (`reduce=`) build on. Models with a distillation token
are not here. Where we differ: images of any size and shape are taken, with positions interpolated. The published 5, 22
and 86 M parameters of tiny, small and base are 5.7, 22.1 and 86.6 M.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._isotropic import VIT_KEYS, Isotropic, build_blocks
from visionzoo.models._registry import Published, Variant, register_family


class DeiT(Isotropic):
    """DeiT, without distillation token: patches, a class token, learned positions, pre-norm blocks, a norm.

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
    CHECKPOINT_KEYS = {"authors": VIT_KEYS}

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


def _weights(size: str) -> dict[str, Any]:
    return {"tag": "fb_in1k", "hf_hub_id": f"timm/deit_{size}_patch16_224.fb_in1k"}


_README = "README_deit.md of facebookresearch/deit"

VARIANTS = {
    "zoo_deit_t": Variant({}, Published(5, None, 72.2, source=_README, explained=("params_m",)), _weights("tiny")),
    "zoo_deit_s": Variant(
        {"embed_dim": 384, "num_heads": 6}, Published(22, None, 79.9, source=_README), _weights("small")
    ),
    "zoo_deit_b": Variant(
        {"embed_dim": 768, "num_heads": 12}, Published(86, None, 81.8, source=_README), _weights("base")
    ),
}

TINY = {"zoo_deit_t": {"depth": 2, "embed_dim": 16, "num_heads": 2}}

register_family(
    __name__,
    DeiT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    crop_pct=0.9,
    paper_ids="arXiv:2012.12877",
    origin_url="https://github.com/facebookresearch/deit",
    license="apache-2.0",
)
