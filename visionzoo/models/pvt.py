"""Pyramid Vision Transformer, ICCV 2021, https://arxiv.org/abs/2102.12122.

Facts from https://github.com/whai362/PVT at 57e2dfa (Apache-2.0); the code here is our own. As released: the tables of
positions are made for 224 px and interpolated (bilinear) to other maps; rows and columns after the last whole patch are
dropped; the last stage has a class token, and the last norm acts on it.

Where we differ: with other mixers in the last stage there is no class token. `class_token=False` gives the network of
the authors' detection and segmentation code, without class token and last norm; it takes the same checkpoints.
Their code does not interpolate the first table where a map has as many places as it, in another shape (112 x 448 px),
and so adds positions of other places; ours interpolates. `pvt_huge_v2`, of which neither numbers nor weights were
published, is `zoo_pvt_l` with `embed_dims=(128, 256, 512, 768)`, `num_heads=(2, 4, 8, 12)` and `depths=(3, 10, 60, 3)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import ClassifierHead, to_2tuple
from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.heads import TokenHead
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.position import PositionTable
from visionzoo.layers.stem import Stem
from visionzoo.layers.tokens import PrefixTokens, TokenBlock, TokenPositions, Tokens
from visionzoo.layers.tracing import replaced
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
    """A stage whose blocks see a class token beside the map.

    Args:
        downsample: of a map [B, H, W, C_in] to [B, H', W', dim].
        blocks: of `Tokens`.
        dim: channels.
        size: height and width of the table of positions.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], dim: int, size: tuple[int, int]):
        super().__init__(downsample, blocks)
        self.prefix = PrefixTokens(dim)
        self.positions = TokenPositions(dim, size, prefix=1, mode="bilinear")

    def forward(self, x: Tensor) -> Any:
        """[B, C_in, H, W] to `Tokens` of [B, H', W', C] and the class token."""
        x = self.downsample(x.permute(0, 2, 3, 1))
        return self.forward_blocks(self.positions(self.prefix(Tokens.of(x))))


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
        "authors": [
            *_KEYS,
            (r"^pos_embed4$", "stages.3.positions.table"),
            (r"^cls_token$", "stages.3.prefix.cls_token"),
        ],
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

        def embed(in_dim: int, dim: int, patch_size: int, size: tuple[int, int] | None) -> list[nn.Module]:
            conv = ConvNorm(in_dim, dim, patch_size, patch_size, norm_layer=LayerNorm)
            return [conv, PositionTable(dim, size)] if size else [conv]

        def downsample(in_dim: int, dim: int, size: tuple[int, int] | None) -> nn.Module:
            return nn.Sequential(*embed(in_dim, dim, 2, size))

        stages = build_stages(
            embed_dims,
            depths,
            num_heads,
            stage_mixers,
            downsample=[partial(downsample, size=size) for size in sizes[1:-1]]
            + [partial(downsample, size=None if class_token else sizes[-1])],
            block=[
                partial(TokenBlock if class_token and i == len(depths) - 1 else Block, mlp_ratio=ratio, norm_layer=norm)
                for i, ratio in enumerate(mlp_ratios)
            ],
            drop_path_rate=drop_path_rate,
        )
        if class_token:
            self.HEAD_INPUT, self.POOLS = "NLC", TokenHead.POOLS
            stages[-1] = ClassTokenStage(stages[-1].downsample, list(stages[-1].blocks), embed_dims[-1], sizes[-1])
            if head.get("global_pool") is None:
                head["global_pool"] = "token"
        super().__init__(
            stem=Stem(*embed(in_chans, embed_dims[0], 4, sizes[0])),
            stages=stages,
            embed_dims=embed_dims,
            norm=norm(embed_dims[-1]) if class_token else None,
            head_layer=TokenHead if class_token else ClassifierHead,
            in_chans=in_chans,
            **head,
        )

    def read(self, i: int, state: Any, norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the map, and the class token of the last stage."""
        if not isinstance(state, Tokens):
            return super().read(i, state, norm)
        tokens = replaced(state, x=self.norm(state.x)) if norm else state
        return tokens.map(), tokens.x[:, :1]

    def finish(self, state: Any) -> Any:
        """Normalize the last stage's tokens [B, 1 + N, C], or return the map [B, C, H, W] where there is no token."""
        return self.norm(state.x) if isinstance(state, Tokens) else super().finish(state)


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

TINY = {"zoo_pvt_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}}

register_family(
    __name__,
    PyramidVisionTransformer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    paper_ids="arXiv:2102.12122",
    origin_url="https://github.com/whai362/PVT",
    license="apache-2.0",
)
