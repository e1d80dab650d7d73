"""Pyramid Vision Transformer, ICCV 2021, https://arxiv.org/abs/2102.12122.

Facts from https://github.com/whai362/PVT at 57e2dfa (Apache-2.0); the code here is our own. As released: the tables of
positions are made for 224 px and interpolated (bilinear) to other maps; rows and columns after the last whole patch are
dropped; the last stage has a class token, and the last norm acts on it.

Where we differ: this zoo's networks give maps, and pool them for the classifier. We add to the last map, normalised, at
all its positions the difference between the class token and their mean, so that its mean is the class token and the
logits are the authors'. `class_token=False` gives the network of the authors' detection and segmentation code instead,
without class token and last norm; it takes the same checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.position import PositionTable, resize_table
from visionzoo.models._pyramid import Pyramid, Stage, build_stages
from visionzoo.models._registry import Published, Variant, register_family

_KEYS: list[tuple[str, Any]] = [
    (r"^patch_embed1\.proj\.", "stem.0.conv."),
    (r"^patch_embed1\.norm\.", "stem.0.norm."),
    (r"^patch_embed(\d)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.0.conv."),
    (r"^patch_embed(\d)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.0.norm."),
    (r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"\.attn\.sr\.", ".mixer.sr.conv."),
    (r"\.attn\.norm\.", ".mixer.sr.norm."),
    (r"\.attn\.", ".mixer."),
    (r"^pos_embed1$", "stem.1.table"),
    (r"^pos_embed([23])$", lambda m: f"stages.{int(m[1]) - 1}.downsample.1.table"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


class ClassTokenStage(Stage):
    """A stage whose blocks see a class token beside the map, and whose output's mean is that token.

    Args:
        downsample: of a map [B, H, W, C_in] to [B, H', W', dim].
        blocks: they get the token and the map as one row, [B, 1, 1 + N, C].
        norm: of token and map after the blocks.
        dim: channels.
        size: height and width of the table of positions.
    """

    NO_WEIGHT_DECAY = ("cls_token",)

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module, dim: int, size: tuple[int, int]
    ):
        super().__init__(downsample, blocks, norm)
        self.size = size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + size[0] * size[1], dim))
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C_in] to [B, H', W', C]."""
        x = self.downsample(x)
        size = x.shape[1:3]
        positions = resize_table(self.pos_embed[:, 1:].unflatten(1, self.size), size, "bilinear")
        token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([token.expand(x.shape[0], -1, -1), (x + positions).flatten(1, 2)], dim=1)
        x = self.norm(self.forward_blocks(x.unsqueeze(1))).squeeze(1)
        token, x = x[:, :1], x[:, 1:]
        return (x + (token - x.mean(1, keepdim=True))).unflatten(1, size)

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's positions [1, 1 + N, C], of token and square map, to the size of ours."""
        if name != "pos_embed":
            return weight
        side = isqrt(weight.shape[1] - 1)
        table = resize_table(weight[:, 1:].unflatten(1, (side, side)), self.size, "bilinear")
        return torch.cat([weight[:, :1], table.flatten(1, 2)], dim=1)


class PyramidVisionTransformer(Pyramid):
    """Pyramid Vision Transformer.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        mlp_ratios: hidden width of the MLPs over the channels, for each stage.
        reductions: side of the patches that attention's keys come from, for each stage.
        img_size: image size in pixels, or (height, width), for which the tables of positions are made.
        class_token: whether the last stage has a class token and a norm; None means where that stage attends
            globally with the family's own mixer.
        qkv_bias: whether the projections to q, k, v have a bias.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if there is to be a class token in a last stage whose mixer wants maps.
    """

    CHECKPOINT_KEYS = {
        "authors, without class token": [
            *_KEYS,
            (r"^pos_embed4$", "stages.3.downsample.1.table"),
            (r"^(cls_token$|norm\.)", None),
        ],
        "authors": [*_KEYS, (r"^(pos_embed)4$|^(cls_token)$|^(norm\.)", r"stages.3.\1\2\3")],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        reductions: Sequence[int] = (8, 4, 2, 1),
        img_size: int | tuple[int, int] = 224,
        class_token: bool | None = None,
        qkv_bias: bool = True,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        own = [[{"type": "spatial_reduction", "reduction": ratio, "qkv_bias": qkv_bias}] for ratio in reductions]
        stage_mixers = resolve_mixers(own, mixers)
        can_have_token = all(
            spec["type"] == "spatial_reduction" and spec.get("reduction", 1) == 1 for spec in stage_mixers[-1]
        )
        if class_token is None:
            class_token = can_have_token
        if class_token and not can_have_token:
            raise ValueError(
                f"PyramidVisionTransformer: class_token=True needs mixer 'spatial_reduction' with reduction 1 in the "
                f"last stage, got {stage_mixers[-1]}; pass class_token=False"
            )
        height, width = to_2tuple(img_size)
        sizes = [(height // 4 // 2**i, width // 4 // 2**i) for i in range(len(depths))]
        if min(sizes[-1]) < 1:
            raise ValueError(
                f"PyramidVisionTransformer: img_size must be {4 * 2 ** (len(depths) - 1)} px at least, got {img_size=}"
            )
        norm = partial(LayerNorm, eps=1e-6)

        def embed(in_dim: int, dim: int, patch_size: int, size: tuple[int, int] | None) -> nn.Sequential:
            conv = ConvNorm(in_dim, dim, patch_size, patch_size, norm_layer=LayerNorm)
            return nn.Sequential(conv, PositionTable(dim, size)) if size else nn.Sequential(conv)

        stages = build_stages(
            embed_dims,
            depths,
            num_heads,
            stage_mixers,
            downsample=[partial(embed, patch_size=2, size=size) for size in sizes[1:-1]]
            + [partial(embed, patch_size=2, size=None if class_token else sizes[-1])],
            block=[partial(Block, mlp_ratio=ratio, norm_layer=norm) for ratio in mlp_ratios],
            drop_path_rate=drop_path_rate,
        )
        if class_token:
            last, dim = stages[-1], embed_dims[-1]
            stages[-1] = ClassTokenStage(last.downsample, list(last.blocks), norm(dim), dim, sizes[-1])
        super().__init__(
            stem=embed(in_chans, embed_dims[0], 4, sizes[0]),
            stages=stages,
            embed_dims=embed_dims,
            in_chans=in_chans,
            **head,
        )


_README = "README.md of whai362/PVT; GMACs: paper, table 2"


def _no_weights(size: str) -> str:
    return f"timm has none; the authors' are at https://github.com/whai362/PVT/releases/download/v2/pvt_{size}.pth"


VARIANTS = {
    "zoo_pvt_t": Variant(
        {"depths": (2, 2, 2, 2)}, Published(13.2, 1.9, 75.1, source=_README), no_weights=_no_weights("tiny")
    ),
    "zoo_pvt_s": Variant(
        {"depths": (3, 4, 6, 3)}, Published(24.5, 3.8, 79.8, source=_README), no_weights=_no_weights("small")
    ),
    "zoo_pvt_m": Variant(
        {"depths": (3, 4, 18, 3)}, Published(44.2, 6.7, 81.2, source=_README), no_weights=_no_weights("medium")
    ),
    "zoo_pvt_l": Variant(
        {"depths": (3, 8, 27, 3)}, Published(61.4, 9.8, 81.7, source=_README), no_weights=_no_weights("large")
    ),
}

register_family(
    __name__,
    PyramidVisionTransformer,
    VARIANTS,
    first_conv="stem.0.conv",
    paper_ids="arXiv:2102.12122",
    origin_url="https://github.com/whai362/PVT",
    license="apache-2.0",
)
