"""Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers, CVPR 2023.

Paper: https://arxiv.org/abs/2303.13755. Facts from https://github.com/lim142857/Sparsifiner at 9a11e26 (MIT); the code
here is our own. DeiT-S whose attention is masked by connections that are predicted for each image, and which can drop
tokens after some blocks (`token_keep_rate`, `prune_after`). As released the masks save no computation; dropped tokens
do here. The authors publish no weights and no table of accuracies. Where we differ: tokens are dropped as the next
block begins, so that the features of the block that chooses have all of them; images of any size and shape are taken,
with positions and the predictor's tables interpolated. For training see `visionzoo.layers.mixers.SparsifinerMixer`;
distillation from a teacher's logits is the engine's, that of its tokens and attention, and the authors' two phases, are
left out. So are their choice of connections and coefficients by thresholds, which their configuration does not use, and
LV-ViT as the host. `mixers` takes the rest: `{"type": "sparsifiner", "reduce_tokens": 8, ...}`, also for each block.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.tokens import map_size
from visionzoo.models._reducing import add_reducers
from visionzoo.models._registry import Published, Variant, register_family
from visionzoo.models.deit import DeiT


class Sparsifiner(DeiT):
    """Sparsifiner.

    Args:
        depth: blocks.
        attn_keep_rate: share of all tokens that a token attends to, in (0, 1].
        token_keep_rate: share of the map's tokens that the first block of `prune_after` leaves, in (0, 1]; the next
            leaves its square, and so on.
        prune_after: numbers of the blocks after which tokens are dropped, by the class token's attention in them.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the tables are made.
        class_token: have a class token.
        reg_tokens: number of register tokens beside it.
        distilled: have a distillation token and the second classifier, see `visionzoo.models.deit.DeiT`.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        rest: see `visionzoo.models.deit.DeiT`.

    Raises:
        ValueError: if `prune_after` names a block after which there is none.
    """

    MIXER = "sparsifiner"
    CHECKPOINT_KEYS = {
        "authors": [
            (r"\.attn\.mask_predictor\.proj_c_(q|k)\.", r".mixer.predictor.proj_\1."),
            (r"\.attn\.mask_predictor\.proj_n$", ".mixer.predictor.to_basis"),
            (r"\.attn\.mask_predictor\.proj_back_n$", ".mixer.predictor.basis"),
            *DeiT.CHECKPOINT_KEYS["authors"],
        ]
    }

    def __init__(
        self,
        *,
        depth: int = 12,
        attn_keep_rate: float = 0.25,
        token_keep_rate: float = 0.7,
        prune_after: Collection[int] = (),
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        reg_tokens: int = 0,
        distilled: bool = False,
        mixers: Any = None,
        **rest: Any,
    ):
        if wrong := [i for i in prune_after if not 0 <= i < depth - 1]:
            raise ValueError(
                f"Sparsifiner: prune_after must name blocks that others follow, from 0 to {depth - 2}, got {wrong}"
            )
        own = {
            "type": "sparsifiner",
            "keep_rate": attn_keep_rate,
            "map_size": map_size(img_size, patch_size),
            "prefix_tokens": class_token + distilled + reg_tokens,
        }
        super().__init__(
            depth=depth,
            patch_size=patch_size,
            img_size=img_size,
            class_token=class_token,
            reg_tokens=reg_tokens,
            distilled=distilled,
            mixers=resolve_mixers([[own]] * depth, mixers),
            **rest,
        )
        rates = {i + 1: token_keep_rate ** (k + 1) for k, i in enumerate(sorted({*prune_after}))}
        spec = {"type": "class_attention", "of_map": True}
        add_reducers(self, [{**spec, "keep_rate": rates[i]} if i in rates else None for i in range(depth)])


VARIANTS = {
    "zoo_sparsifiner_s": Variant(
        {"embed_dim": 384, "num_heads": 6}, Published(), no_weights="the authors published none"
    ),
}

TINY = {
    "zoo_sparsifiner_s": {"depth": 3, "embed_dim": 16, "num_heads": 2, "img_size": 64, "prune_after": (0,)},
}

register_family(
    __name__,
    Sparsifiner,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    crop_pct=0.9,
    paper_ids="arXiv:2303.13755",
    origin_url="https://github.com/lim142857/Sparsifiner",
    license="mit",
)
