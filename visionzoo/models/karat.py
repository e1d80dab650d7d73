"""KArAt: Kolmogorov-Arnold Attention, 2025, https://arxiv.org/abs/2503.10632.

There is no code of the authors to compare with: https://github.com/MaitySubhajit/KArAt (39142d6, MIT) has none yet.
This follows the paper's text (version 3: equations 2 and 5, algorithms 1 and 2): a ViT as timm's DeiT, whose scores
pass through learned Fourier series of rank 12 in place of softmax. A name says size, terms of the series (`g3`), and
whether each block has its own functions ("b", blockwise) or all share those of each head ("u", universal). The tests
compare it with the equations, not with unseen code, and no checkpoint of the authors fits. The published parameters
exceed the equations' by two numbers for each function, which the paper does not name, and leave the 1000 classes out in
tiny and base models, so that the 5.59 M of `t_g3u` are 5.8 M here. Its other bases (wavelets, rational functions) are
not here.

Where we differ: images of any size and shape are taken, with functions and positions interpolated and sums scaled to
the number of tokens; the paper takes one size.
"""

from __future__ import annotations

from typing import Any

from visionzoo.layers.mixers import combine_mixers
from visionzoo.layers.mixers.kolmogorov_arnold import KolmogorovArnoldMixer
from visionzoo.layers.tokens import map_size
from visionzoo.models._registry import Published, Variant, register_family
from visionzoo.models.deit import DeiT


class KArAt(DeiT):
    """ViT with learned activations of attention.

    Args:
        depth: blocks.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which functions and positions are made.
        class_token: have a class token.
        reg_tokens: number of register tokens beside it.
        distilled: have a distillation token and the second classifier, see `visionzoo.models.deit.DeiT`.
        grid_size: terms of the Fourier series.
        rank: values between a row of scores and its weights.
        base: function that is added to each series: "zero", "identity", "silu" or "gelu".
        project: bring these values to the probability simplex.
        shared: let all blocks share the functions of each head.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        others: as `DeiT` takes them.

    Raises:
        ValueError: if the base is unknown, or `grid_size` or `rank` not positive.
    """

    CHECKPOINT_KEYS = {"DeiT's": DeiT.CHECKPOINT_KEYS["authors"]}

    def __init__(
        self,
        *,
        depth: int = 12,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        reg_tokens: int = 0,
        distilled: bool = False,
        grid_size: int = 3,
        rank: int = 12,
        base: str = "zero",
        project: bool = False,
        shared: bool = False,
        mixers: Any = None,
        **others: Any,
    ):
        own = {
            "type": "kolmogorov_arnold",
            "map_size": map_size(img_size, patch_size),
            "prefix_tokens": class_token + distilled + reg_tokens,
            "grid_size": grid_size,
            "rank": rank,
            "base": base,
            "project": project,
        }
        super().__init__(
            depth=depth,
            patch_size=patch_size,
            img_size=img_size,
            class_token=class_token,
            reg_tokens=reg_tokens,
            distilled=distilled,
            mixers=combine_mixers([[own]] * depth, mixers),
            **others,
        )
        borrowers = [m for m in self.modules() if isinstance(m, KolmogorovArnoldMixer)] if shared else []
        if borrowers:
            self.activation = borrowers[0].functions
            self.stem_names = (*self.stem_names, "activation")
            for mixer in borrowers:
                mixer.borrow(self.activation)


_SIZES: dict[str, dict[str, Any]] = {
    "t": {},
    "s": {"embed_dim": 384, "num_heads": 6},
    "b": {"embed_dim": 768, "num_heads": 12},
}


def _published(size: str, grid_size: int, shared: bool, params_m: float, top1: float, **about: Any) -> Variant:
    return Variant(
        {**_SIZES[size], "grid_size": grid_size, **({"shared": True} if shared else {})},
        Published(params_m, top1=top1, source="paper (version 3), table 1", **about),
        no_weights="the authors published neither code nor weights",
    )


VARIANTS = {
    "zoo_karat_t_g3b": _published("t", 3, False, 6.29, 59.11),
    "zoo_karat_t_g3u": _published("t", 3, True, 5.59, 57.97, explained=("params_m",)),
    "zoo_karat_s_g3b": _published("s", 3, False, 23.58, 67.77),
    "zoo_karat_s_g3u": _published("s", 3, True, 22.18, 67.76),
    "zoo_karat_b_g1b": _published("b", 1, False, 87.51, 68.03),
    "zoo_karat_b_g1u": _published("b", 1, True, 85.95, 68.83),
}

_TINY = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 64}
TINY = {"zoo_karat_t_g3b": _TINY, "zoo_karat_t_g3u": _TINY}

register_family(
    __name__,
    KArAt,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    crop_pct=0.9,
    paper_ids="arXiv:2503.10632",
    origin_url="https://github.com/MaitySubhajit/KArAt",
    license="mit",
)
