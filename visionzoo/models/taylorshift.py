"""TaylorShift: Shifting the Complexity of Self-Attention from Squared to Linear (and Back) using Taylor-Softmax.

ICPR 2024, https://arxiv.org/abs/2403.02920. Facts from taylor_shift.py of https://github.com/tobna/TaylorShift at
b290faa (MIT); the code here is our own. A ViT whose positions are only those of the map. As released, `coefficients`
given to the model never reach the attention there; here they do. Where we differ: images of any size and shape are
taken, with positions interpolated. The authors' argument `pre_norm`, which norms before the blocks, is left out. Their
folder `training` scales branches by 1e-4 at the start (`layer_scale`). Its text models, and its XCiT with this
attention, are not here.
"""

from __future__ import annotations

from functools import partial
from math import log2
from typing import Any

from torch import nn

from visionzoo.layers.heads import TokenHead
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import conv_stem
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._isotropic import VIT_KEYS, Isotropic, build_blocks
from visionzoo.models._registry import Variant, register_family


class TaylorShiftViT(Isotropic):
    """ViT with Taylor-softmax attention.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        normalize_input: bring queries and keys to length 1, with a learned temperature for each head.
        output_normalized: multiply attention's output by √(tokens / head width).
        threshold: tokens above which attention's linear form runs; None for D² + D + 1 with heads of width D, 0 for
            always. The two forms are equal.
        coefficients: of the polynomial a·s² + b·s + c of the scores.
        conv_embed: have a stem of 3×3 convolutions of stride 2 with batch norm, not one of patches; `patch_size` is
            then a power of two.
        layer_scale: initial value of a learned scale of each branch, or None for none.
        class_position: give the class token and registers a position, too (the authors' `no_embed_class=False`).
        norm_pooled: normalize what is pooled, not the tokens before (the authors' `fc_norm`; theirs are True for
            `global_pool="avg"` and False for "token").
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        class_token: have a class token.
        reg_tokens: number of register tokens beside it.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if convolutions of stride 2 cannot make the patches, or not of these channels.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^patch_embed\.proj\.(\d+)\.0\.", r"stem.\1.conv."),
            (r"^patch_embed\.proj\.(\d+)\.1\.", r"stem.\1.norm."),
            (r"^fc_norm\.", "head.norm."),
            *VIT_KEYS,
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
        normalize_input: bool = True,
        output_normalized: bool = True,
        threshold: int | None = None,
        coefficients: tuple[float, float, float] = (0.5, 1.0, 1.0),
        conv_embed: bool = False,
        layer_scale: float | None = None,
        class_position: bool = False,
        norm_pooled: bool = False,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        reg_tokens: int = 0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        own = {
            "type": "taylor_shift",
            "qkv_bias": qkv_bias,
            "normalize_input": normalize_input,
            "output_normalized": output_normalized,
            "threshold": threshold,
            "coefficients": coefficients,
        }
        norm = partial(LayerNorm, eps=1e-6)
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [own] * depth,
                mixers,
                block=partial(TokenBlock, mlp_ratio=mlp_ratio, norm_layer=norm, layer_scale=layer_scale),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            stem=_convolutions(in_chans, embed_dim, patch_size) if conv_embed else None,
            class_token=class_token,
            reg_tokens=reg_tokens,
            positions="all" if class_position else "map",
            norm=None if norm_pooled else norm(embed_dim),
            head_layer=partial(TokenHead, norm_layer=norm if norm_pooled else None),
            in_chans=in_chans,
            **head,
        )


def _convolutions(in_chans: int, dim: int, patch_size: int) -> nn.Module:
    steps = int(log2(patch_size))
    if 2**steps != patch_size or steps == 0 or dim % 2 ** (steps - 1):
        raise ValueError(
            f"TaylorShiftViT: conv_embed=True needs a patch_size that is a power of two, and an embed_dim that half of "
            f"it divides, got {patch_size=} and embed_dim={dim}"
        )
    return conv_stem(in_chans, [dim >> i for i in reversed(range(steps))], 3, [2] * steps, nn.GELU, last_act=False)


_NO_WEIGHTS = "the authors published none"

VARIANTS = {
    "zoo_taylorshift_na": Variant({"embed_dim": 96, "depth": 2, "num_heads": 2}, no_weights=_NO_WEIGHTS),
    "zoo_taylorshift_mu": Variant({"embed_dim": 144, "depth": 6, "num_heads": 3}, no_weights=_NO_WEIGHTS),
    "zoo_taylorshift_ti": Variant({}, no_weights=_NO_WEIGHTS),
    "zoo_taylorshift_s": Variant({"embed_dim": 384, "num_heads": 6}, no_weights=_NO_WEIGHTS),
    "zoo_taylorshift_b": Variant({"embed_dim": 768, "num_heads": 12}, no_weights=_NO_WEIGHTS),
    "zoo_taylorshift_l": Variant({"embed_dim": 1024, "depth": 24, "num_heads": 16}, no_weights=_NO_WEIGHTS),
}

TINY: dict[str, dict[str, Any]] = {
    "zoo_taylorshift_ti": {"depth": 2, "embed_dim": 16, "num_heads": 2},
    "zoo_taylorshift_s": {
        "depth": 2,
        "embed_dim": 16,
        "num_heads": 2,
        "patch_size": 8,
        "threshold": 0,
        "normalize_input": False,
        "conv_embed": True,
        "layer_scale": 1e-4,
    },
}

register_family(
    __name__,
    TaylorShiftViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    paper_ids="arXiv:2403.02920",
    origin_url="https://github.com/tobna/TaylorShift",
    license="mit",
)
