"""DeiT: Training data-efficient image transformers & distillation through attention, https://arxiv.org/abs/2012.12877.

ICML 2021. Facts from https://github.com/facebookresearch/deit at 7e160fe (Apache-2.0); the code here is our own. It is
the plain transformer that papers on mixers and on fewer tokens (`reduce=`) build on. Those named `_distilled` have a
second token and classifier; as released, the answer is the mean of both classifiers' logits. Where we differ: images of
any size and shape are taken, with positions interpolated; training gives both logits only after
`set_distilled_training()`. The published 5 M parameters of the tiny model are 5.7 M.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from visionzoo.layers.heads import TokenHead
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._isotropic import VIT_KEYS, Isotropic, build_blocks
from visionzoo.models._registry import Published, Variant, register_family


class DeiT(Isotropic):
    """DeiT: patches, a class token, learned positions, pre-norm blocks, a norm.

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
        distilled: have a distillation token and the second classifier, which reads it and learns from a teacher after
            `set_distilled_training()`.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if `distilled` comes without class token, or a rate is not a probability.
    """

    MIXER = "full"
    CHECKPOINT_KEYS = {"authors": [(r"^head_dist\.(weight|bias)$", r"head.fc_dist.\1"), *VIT_KEYS]}

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
        distilled: bool = False,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        if distilled and not class_token:
            raise ValueError(
                f"{type(self).__name__}: distilled=True needs a class token beside that of distillation, got "
                f"class_token=False; leave that out"
            )
        if distilled:
            self.POOLS = ("token", "")  # each classifier reads its token
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
            dist_token=distilled,
            reg_tokens=reg_tokens,
            norm=norm(embed_dim),
            head_layer=partial(TokenHead, distilled=distilled),
            in_chans=in_chans,
            **head,
        )


_README = "README_deit.md of facebookresearch/deit"
_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "t": ("tiny", {}),
    "s": ("small", {"embed_dim": 384, "num_heads": 6}),
    "b": ("base", {"embed_dim": 768, "num_heads": 12}),
}
_PUBLISHED = {  # millions of parameters, top-1
    "t": (5, 72.2),
    "s": (22, 79.9),
    "b": (86, 81.8),
    "t_distilled": (6, 74.5),
    "s_distilled": (22, 81.2),
    "b_distilled": (87, 83.4),
    "b_384": (87, 82.9),
    "b_distilled_384": (88, 85.2),
}


def _variant(name: str) -> Variant:
    size, *more = name.split("_")
    theirs, kwargs = _SIZES[size]
    side = 224
    weights: dict[str, Any] = {"tag": "fb_in1k"}
    if "distilled" in more:
        theirs += "_distilled"
        kwargs = {**kwargs, "distilled": True}
        weights["classifier"] = ("head.fc", "head.fc_dist")
    if "384" in more:
        side = 384
        kwargs = {**kwargs, "img_size": side}
        weights |= {"input_size": (3, side, side), "crop_pct": 1.0}
    weights["hf_hub_id"] = f"timm/deit_{theirs}_patch16_{side}.fb_in1k"
    params, top1 = _PUBLISHED[name]
    explained = ("params_m",) if name == "t" else ()
    return Variant(kwargs, Published(params, None, top1, side, _README, explained), weights)


VARIANTS = {f"zoo_deit_{name}": _variant(name) for name in _PUBLISHED}

_TINY = {"depth": 2, "embed_dim": 16, "num_heads": 2}
TINY = {"zoo_deit_t": _TINY, "zoo_deit_t_distilled": _TINY}

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
