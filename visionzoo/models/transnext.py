"""TransNeXt: Robust Foveal Visual Perception for Vision Transformers, CVPR 2024, https://arxiv.org/abs/2311.17132.

Facts from https://github.com/DaiShiResearch/TransNeXt at c8a9974 (Apache-2.0); the code here is our own. The backbone
is PVTv2's with aggregated attention and gated MLPs; images may have any size. On maps of other sizes than in training
the biases of positions are computed from the offsets, as the authors' dense models do with `is_extrapolation=True`;
`interpolate_bias=True` is their default there: those of `img_size` are interpolated. Micro's 2.6 GMACs are published as
2.7: products with a window are no matrix products here, and are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple

from visionzoo.layers.mixers import combine_mixers
from visionzoo.models._registry import Published, Variant, register_family
from visionzoo.models.pvtv2 import PyramidVisionTransformerV2


class TransNeXt(PyramidVisionTransformerV2):
    """TransNeXt.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        mlp_ratios: 1.5 times the hidden width of the gated MLPs over the channels, for each stage.
        reductions: side in tokens of the cells that attention's pooled keys come from, for each stage; 1 for attention
            to all tokens, without a window.
        window_size: side of attention's window in tokens, odd.
        pool_size: cells along each axis where `reductions` is above 1, whatever the image; None for what that gives.
        img_size: size in pixels of the images trained on, or (height, width); others may be given.
        pretrain_size: size of the images that the biases of positions were first trained on, to which offsets are
            relative; None means `img_size`.
        interpolate_bias: on maps of other sizes than those of `img_size`, interpolate the biases of the latter instead
            of computing them from the offsets.
        qkv_bias: whether the projections to q, k, v have a bias.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        others: `in_chans`, `drop_path_rate`, and the head's, as `PyramidVisionTransformerV2` takes them.

    Raises:
        ValueError: if a size is too small for the number of stages.
    """

    DYNAMIC_SIZE = False  # the number of cells depends on the size
    MIXER = "aggregated"
    CHECKPOINT_KEYS = {
        "authors": [
            (r"\.attn\.qkv\.(weight|bias)$", (r".mixer.q.\1", r".mixer.kv.\1#0", r".mixer.kv.\1#1")),
            (r"\.attn\.(sr|norm)\.", r".mixer.\1."),
            (r"\.attn\.cpb_fc(\d)\.", r".mixer.position_bias.fc\1."),
            (r"\.attn\.relative_pos_bias_local$", ".mixer.window_bias"),
            (r"\.attn\.learnable_tokens$", ".mixer.window_tokens"),
            (r"\.attn\.learnable_bias$", ".mixer.window_offset"),
            (r"\.attn\.wg\.", ".mixer.router.routed."),
            (r"\.attn\.wg_0\.", ".mixer.router.kinds."),
            (r"\.attn\.wg_1\.", ".mixer.router.shared."),
            *PyramidVisionTransformerV2.CHECKPOINT_KEYS["authors"],
        ]
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 15, 2),
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        reductions: Sequence[int] = (8, 4, 2, 1),
        window_size: int = 3,
        pool_size: int | None = None,
        img_size: int | tuple[int, int] = 224,
        pretrain_size: int | tuple[int, int] | None = None,
        interpolate_bias: bool = False,
        qkv_bias: bool = True,
        mixers: Any = None,
        **others: Any,
    ):
        trained, first = to_2tuple(img_size), to_2tuple(img_size if pretrain_size is None else pretrain_size)
        if min(*trained, *first) < 4 * 2 ** (len(depths) - 1):
            raise ValueError(
                f"{type(self).__name__}: img_size and pretrain_size must be {4 * 2 ** (len(depths) - 1)} px at least, "
                f"got {img_size=} and {pretrain_size=}"
            )

        def map_size(size: tuple[int, int], stage: int) -> tuple[int, int]:
            return size[0] // (4 * 2**stage), size[1] // (4 * 2**stage)

        own = [
            [
                {
                    "type": self.MIXER,
                    "window_size": window_size,
                    "reduction": reduction,
                    "pool_size": pool_size if reduction > 1 else None,
                    "map_size": map_size(first, i),
                    "bias_size": map_size(trained, i) if interpolate_bias else None,
                    "qkv_bias": qkv_bias,
                }
            ]
            for i, reduction in enumerate(reductions)
        ]
        super().__init__(
            depths=depths,
            embed_dims=embed_dims,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            reductions=reductions,
            mlp_gated=True,
            qkv_bias=qkv_bias,
            mixers=combine_mixers(own, mixers),
            **others,
        )


def size(name: str) -> dict[str, Any]:
    """Return the arguments of "micro", "tiny", "small" or "base"."""
    width = {"micro": 48, "tiny": 72, "small": 72, "base": 96}[name]
    return {
        "depths": {"small": (5, 5, 22, 5), "base": (5, 5, 23, 5)}.get(name, (2, 2, 15, 2)),
        "embed_dims": tuple(width * 2**i for i in range(4)),
        "num_heads": tuple(width // 24 * 2**i for i in range(4)),
    }


def _variant(name: str, published: Published, weights: str, **changed: Any) -> Variant:
    side = published.size
    cfg: dict[str, Any] = {"input_size": (3, side, side), "pool_size": (side // 32, side // 32)}
    if side == 384:
        changed, cfg = {"pretrain_size": 224, **changed}, {**cfg, "crop_pct": 1.0, "crop_mode": "squash"}
    return Variant(
        {**size(name), "img_size": side, **changed},
        published,
        cfg,
        no_weights=f"the authors' are at https://huggingface.co/DaiShiResearch/transnext-{weights}",
    )


_README = "README.md of DaiShiResearch/TransNeXt"

VARIANTS = {
    "zoo_transnext_micro": _variant(
        "micro", Published(12.8, 2.7, 82.5, source=_README, explained=("gmacs",)), "micro-224-1k"
    ),
    "zoo_transnext_micro_aaaa": _variant(
        "micro", Published(13.1, 3.3, 82.6, 256, _README), "micro-AAAA-256-1k", reductions=(16, 8, 4, 2)
    ),
    "zoo_transnext_tiny": _variant("tiny", Published(28.2, 5.7, 84.0, source=_README), "tiny-224-1k"),
    "zoo_transnext_small": _variant("small", Published(49.7, 10.3, 84.7, source=_README), "small-224-1k"),
    "zoo_transnext_small_384": _variant("small", Published(49.7, 32.1, 86.0, 384, _README), "small-384-1k-ft-1k"),
    "zoo_transnext_base": _variant("base", Published(89.7, 18.4, 84.8, source=_README), "base-224-1k"),
    "zoo_transnext_base_384": _variant("base", Published(89.7, 56.3, 86.2, 384, _README), "base-384-1k-ft-1k"),
}

_SMALL = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}
TINY = {"zoo_transnext_micro": {**_SMALL, "reductions": (4, 2, 2, 1)}}

register_family(
    __name__,
    TransNeXt,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    paper_ids="arXiv:2311.17132",
    origin_url="https://github.com/DaiShiResearch/TransNeXt",
    license="apache-2.0",
)
