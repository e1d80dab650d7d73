"""Conditional Position Encodings for Vision Transformers (CPVT), ICLR 2023, https://arxiv.org/abs/2102.10882.

The authors' code exists only in part: gvt.py of https://github.com/Meituan-AutoML/Twins at c1ff671 (Apache-2.0) has the
position generator (PosCNN); the network around it was never released. It is DeiT's here, as the paper says: patches of
16, pre-norm blocks with LayerNorm eps 1e-6, no table of positions. The paper's text decides the rest: a generator after
the first block, which a class token passes by; `zoo_cpvt_*_gap` have no class token and pool the map. So the records
check the arithmetic, not that unseen code computes the same, and no checkpoint of the authors fits. `peg_after` gives
the paper's further models, such as (0, 1, 2, 3, 4, 5). Images of any size are taken. The code here is our own.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._isotropic import VIT_KEYS, Isotropic, build_blocks
from visionzoo.models._positions import add_position_generators
from visionzoo.models._registry import Published, Variant, register_family


class ConditionalTransformer(Isotropic):
    """CPVT.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        patch_size: side of the patches in pixels.
        class_token: have a class token.
        reg_tokens: number of register tokens.
        peg_after: numbers of the blocks that a position generator follows.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if `peg_after` names a block that there is not.
    """

    CHECKPOINT_KEYS = {
        "DeiT's, with PosCNN as pos_block": [
            (r"^pos_block\.proj\.0\.", "blocks.0.peg."),
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
        patch_size: int = 16,
        class_token: bool = True,
        reg_tokens: int = 0,
        peg_after: Collection[int] = (0,),
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
                [{"type": "full", "qkv_bias": qkv_bias}] * depth,
                mixers,
                block=partial(TokenBlock, mlp_ratio=mlp_ratio, norm_layer=norm),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            class_token=class_token,
            reg_tokens=reg_tokens,
            positions="none",
            norm=norm(embed_dim),
            in_chans=in_chans,
            **head,
        )
        add_position_generators(self, after=peg_after)


_NO_WEIGHTS = "the authors released neither code nor weights"
_SIZES = {
    "t": {},
    "s": {"embed_dim": 384, "num_heads": 6},
    "b": {"embed_dim": 768, "num_heads": 12},
}
_PUBLISHED = {  # millions of parameters, top-1 with class token and without
    "t": (6.0, 72.4, 74.9),
    "s": (22.0, 79.9, 81.5),
    "b": (86.0, None, None),
}

VARIANTS = {
    f"zoo_cpvt_{size}{'' if token else '_gap'}": Variant(
        {**_SIZES[size], **({} if token else {"class_token": False})},
        Published(
            params,
            None,
            with_token if token else without,
            source="paper, as quoted by others, not checked against its text",
        ),
        no_weights=_NO_WEIGHTS,
    )
    for token in (True, False)
    for size, (params, with_token, without) in _PUBLISHED.items()
}

TINY = {
    "zoo_cpvt_t": {"depth": 2, "embed_dim": 16, "num_heads": 2},
    "zoo_cpvt_t_gap": {"depth": 2, "embed_dim": 16, "num_heads": 2},
}

register_family(
    __name__,
    ConditionalTransformer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    paper_ids="arXiv:2102.10882",
    origin_url="https://github.com/Meituan-AutoML/Twins",
    license="apache-2.0",
)
