"""Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling, NeurIPS 2024, https://arxiv.org/abs/2402.18508.

Facts from https://github.com/Karami-m/orchid at 061f6df (MIT), which only has the operator, not the networks; the code
here is our own. The operator is theirs, compared with a transcript of that code, in its non-causal form, which images
take, with one layer in each conditioning network; the causal form, which is not here, gives an output for each pair of
samples of a batch. Around it stands a ViT with the sizes of DeiT and without class token, which is ours: the networks
that the paper trained on images were not released, so that no published number stands here. Tokens are a sequence, row
by row. Images of any size and shape are taken, with what the kernels know of places interpolated.
"""

from __future__ import annotations

from typing import Any

from visionzoo.layers.mixers import combine_mixers
from visionzoo.layers.tokens import map_size
from visionzoo.models._registry import Published, Variant, register_family
from visionzoo.models.deit import DeiT


class Orchid(DeiT):
    """ViT with data-dependent global convolutions.

    Args:
        depth: blocks.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which kernels and positions are made.
        conditioning: how kernels are made from the input: "magnitude" or "correlation".
        transform: "fft", "fft_ortho" or "dct".
        class_token: have a class token, which passes by the convolutions.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        others: as `DeiT` takes them.

    Raises:
        ValueError: if `conditioning` or `transform` is unknown.
    """

    POOL = "avg"
    CHECKPOINT_KEYS = {"DeiT's": DeiT.CHECKPOINT_KEYS["authors"]}

    def __init__(
        self,
        *,
        depth: int = 12,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        conditioning: str = "magnitude",
        transform: str = "dct",
        class_token: bool = False,
        mixers: Any = None,
        **others: Any,
    ):
        own = {
            "type": "data_dependent_conv",
            "map_size": map_size(img_size, patch_size),
            "conditioning": conditioning,
            "transform": transform,
        }
        super().__init__(
            depth=depth,
            patch_size=patch_size,
            img_size=img_size,
            class_token=class_token,
            mixers=combine_mixers([[own]] * depth, mixers),
            **others,
        )


_NO_WEIGHTS = "the authors published only the operator, and no weights"

VARIANTS = {
    "zoo_orchid_t": Variant({}, Published(), no_weights=_NO_WEIGHTS),
    "zoo_orchid_s": Variant({"embed_dim": 384, "num_heads": 6}, Published(), no_weights=_NO_WEIGHTS),
    "zoo_orchid_b": Variant({"embed_dim": 768, "num_heads": 12}, Published(), no_weights=_NO_WEIGHTS),
}

TINY = {"zoo_orchid_t": {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 64}}

register_family(
    __name__,
    Orchid,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    paper_ids="arXiv:2402.18508",
    origin_url="https://github.com/Karami-m/orchid",
    license="mit",
)
