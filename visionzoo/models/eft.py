"""EFT: Embedding-Free Transformer, the encoder of EDAFormer, ECCV 2024, https://arxiv.org/abs/2407.17261.

Facts from https://github.com/hyunwoo137/EDAFormer at 9f98d76 (Apache-2.0); the code here is our own. PVTv2-Linear whose
attention has no embeddings: tokens are their own queries, and one linear layer of pooled tokens gives keys that are
values too. `isr=(2, 2, 1, 1)` is the paper's inference spatial reduction: in eval mode keys are pooled over that many
times larger patches, with the same weights. The authors' code has the encoder only; the classifier on the mean of its
last map is PVTv2's. They state no ImageNet numbers there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visionzoo.layers.mixers import combine_mixers
from visionzoo.models._registry import Variant, register_family
from visionzoo.models.pvtv2 import PyramidVisionTransformerV2


class EmbeddingFreeTransformer(PyramidVisionTransformerV2):
    """EFT.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        mlp_ratios: hidden width of the MLPs over the channels, for each stage; rounded down to whole channels.
        reductions: side of the patches that keys come from, for each stage.
        isr: what multiplies these sides in eval mode, for each stage.
        linear: a ReLU before the MLPs' convolutions, as in PVTv2-B2-Linear.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        others: `in_chans`, `drop_path_rate`, and the head's, as `PyramidVisionTransformerV2` takes them.

    Raises:
        ValueError: if `isr` does not have one entry for each stage.
    """

    CHECKPOINT_KEYS = {
        "authors": [(r"\.attn\.sr\.", ".mixer.kv."), *PyramidVisionTransformerV2.CHECKPOINT_KEYS["authors"]]
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 10, 2),
        embed_dims: Sequence[int] = (32, 64, 128, 256),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (3.8, 3.8, 3.8, 3.8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        isr: Sequence[int] = (1, 1, 1, 1),
        linear: bool = True,
        mixers: Any = None,
        **others: Any,
    ):
        if len(isr) != len(reductions):
            raise ValueError(f"EmbeddingFreeTransformer: expected one isr for each stage, got {isr=} and {reductions=}")
        own = [
            [{"type": "embedding_free", "reduction": reduction, "isr": factor}]
            for reduction, factor in zip(reductions, isr, strict=True)
        ]
        super().__init__(
            depths=depths,
            embed_dims=embed_dims,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            reductions=reductions,
            mlp_relu=linear,
            mixers=combine_mixers(own, mixers),
            **others,
        )


_CLOUD = "the authors' are linked in https://github.com/hyunwoo137/EDAFormer#evaluation"

VARIANTS = {
    "zoo_eft_t": Variant({}, no_weights=_CLOUD),
    "zoo_eft_b": Variant(
        {"depths": (3, 3, 22, 3), "embed_dims": (64, 128, 256, 512), "mlp_ratios": (4.0, 4.0, 4.0, 4.0)},
        no_weights=_CLOUD,
    ),
}

TINY = {"zoo_eft_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}}

register_family(
    __name__,
    EmbeddingFreeTransformer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    paper_ids="arXiv:2407.17261",
    origin_url="https://github.com/hyunwoo137/EDAFormer",
    license="apache-2.0",
)
