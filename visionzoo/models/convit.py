"""ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, ICML 2021.

Paper: https://arxiv.org/abs/2103.10697. Facts from https://github.com/facebookresearch/convit at 0a9340a (Apache-2.0;
headers of its convit.py say CC-BY-NC); the code here is our own. As released: positions are those of the map, the class
token has none and joins before the last two blocks. Where we differ: images of any size and shape are taken, with
positions interpolated. The small model has 27.8 M parameters and 5.7 GMACs in the authors' own code, not the published
27 and 5.4; the base one has 17.5 GMACs, not 17.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from visionzoo.layers.mixers.gated_positional import GatedPositionalMixer
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.tokens import TokenBlock
from visionzoo.models._isotropic import VIT_KEYS, Isotropic, build_blocks
from visionzoo.models._registry import Published, Variant, register_family


class ConViT(Isotropic):
    """ConViT.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: attention heads.
        local_depth: blocks with gated positional attention, without class token; full attention follows.
        locality_strength: how sharply these attend to positions at the start.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        position_table: have that table; without it only the local blocks know places.
        class_token: have a class token.
        reg_tokens: number of register tokens beside it.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"\.attn\.gating_param$", ".mixer.gate"),
            (r"\.attn\.rel_indices$", None),
            *VIT_KEYS,
        ],
    }

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 192,
        num_heads: int = 4,
        local_depth: int = 10,
        locality_strength: float = 1.0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        position_table: bool = True,
        class_token: bool = True,
        reg_tokens: int = 0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        if not 0 <= local_depth < depth:
            raise ValueError(f"ConViT: local_depth must be from 0 to below {depth=}, got {local_depth=}")
        local = {"type": "gated_positional", "qkv_bias": qkv_bias, "locality_strength": locality_strength}
        norm = partial(LayerNorm, eps=1e-6)
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [local] * local_depth + [{"type": "full", "qkv_bias": qkv_bias}] * (depth - local_depth),
                mixers,
                block=partial(TokenBlock, mlp_ratio=mlp_ratio, norm_layer=norm),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            class_token=class_token,
            reg_tokens=reg_tokens,
            prefix_at=local_depth,
            positions="map" if position_table else "none",
            norm=norm(embed_dim),
            in_chans=in_chans,
            **head,
        )

    def init_weights(self) -> None:
        """Initialize as released: local heads as convolutions."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, GatedPositionalMixer):
                module.init_weights()


def _weights(size: str) -> dict[str, Any]:
    return {"tag": "fb_in1k", "hf_hub_id": f"timm/convit_{size}.fb_in1k"}


_PAPER = "paper, not checked against its text"

VARIANTS = {
    "zoo_convit_t": Variant({}, Published(params_m=6.0, gmacs=1.0, top1=73.1, source=_PAPER), _weights("tiny")),
    "zoo_convit_s": Variant(
        {"embed_dim": 432, "num_heads": 9},
        Published(27.0, 5.4, 81.3, source=_PAPER, explained=("params_m", "gmacs")),
        _weights("small"),
    ),
    "zoo_convit_b": Variant(
        {"embed_dim": 768, "num_heads": 16},
        Published(86.0, 17.0, 82.4, source=_PAPER, explained=("gmacs",)),
        _weights("base"),
    ),
}

TINY = {"zoo_convit_t": {"depth": 3, "local_depth": 2, "embed_dim": 16}}

register_family(
    __name__,
    ConViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    crop_pct=0.875,
    paper_ids="arXiv:2103.10697",
    origin_url="https://github.com/facebookresearch/convit",
    license="apache-2.0",
)
