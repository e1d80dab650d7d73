"""SpectFormer: Frequency and Attention is what you need in a Vision Transformer, https://arxiv.org/abs/2304.06446.

Facts from https://github.com/badripatro/SpectFormers at b6cf487, which states no license; the code here is our own, and
the class token's block is timm's. Hierarchical and plain networks filter the map's frequencies first and attend then.
As released, maps are rounded to float32 before they are filtered, in a float64 model too.

The hierarchical ones (`zoo_spectformer_h_*`) filter in two stages; their logits are those of the class token plus half
the largest of each class over all tokens. The published models learn from labels of tokens, which another network made;
no recipe here has these, and `token_label=False` leaves the second classifier out. The published 3.9, 6.3 and 12.7
GMACs are those of the layers, without attention's products: with them they are 4.1, 6.6 and 13.2, still without the
Fourier transforms.

The plain ones have no class token and one residual around filter and MLP in the first four blocks. Their code sets 6
heads whatever the width, with which t and b do not run; its note says 4, 6 and 12 for tiny, small and base, of which 12
does not divide b's 512 channels. Here all have heads of 64 channels: 4 (t), 6 (xs, s), 8 (b). The paper has no plain
large one: `zoo_spectformer_l` is what the authors' log of b begins with, 768 channels, 12 blocks and 77.8 M parameters;
its name is ours, and the 12 heads are those of that note. The published 22 M of xs are 20.0 M in code and log.

Where we differ: the filters are made for 224 px, or for `img_size`, and interpolated to other sizes in every pass; the
authors' code takes one size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import to_2tuple
from torch import nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.heads import ClassAttentionHead
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.mlp import ConvMlp
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import Stem
from visionzoo.layers.tokens import TokenBlock, Tokens, map_size, mix_tokens
from visionzoo.layers.tracing import replaced
from visionzoo.models._isotropic import VIT_KEYS, Isotropic, build_blocks
from visionzoo.models._pyramid import Pyramid, build_stages
from visionzoo.models._registry import Published, Variant, register_family
from visionzoo.models.pvtv2 import init_by_fan_out


class SpectFormer(Pyramid):
    """Hierarchical SpectFormer.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        mlp_ratios: hidden width of the MLPs over the channels, for each stage.
        stem_dim: channels inside the stem.
        spectral_stages: how many stages come first that filter frequencies.
        img_size: image size in pixels, or (height, width), for which the filters are made.
        token_label: have a second classifier, of every token.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if the image size is not positive.
    """

    POOLS = ("", "avg", "max", "avgmax")
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^patch_embed1\.conv\.([036])\.", lambda m: f"stem.{int(m[1]) // 3 * 2}.conv."),
            (r"^patch_embed1\.conv\.([147])\.", lambda m: f"stem.{int(m[1]) // 3 * 2}.norm."),
            (r"^patch_embed1\.proj\.", "stem.6.conv."),
            (r"^patch_embed1\.norm\.", "stem.6.norm."),
            (r"^patch_embed(\d)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv."),
            (r"^patch_embed(\d)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm."),
            (r"^block(\d)\.(\d+)\.attn\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.mixer."),
            (r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
            (r"\.dwconv\.dwconv\.", ".dwconv."),
            (r"^norm4\.", "head.norm."),
            (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
            (r"^post_network\.0\.", "head.block."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
            (r"^aux_head\.", "head.fc_aux."),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        embed_dims: Sequence[int] = (64, 128, 320, 448),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        stem_dim: int = 32,
        spectral_stages: int = 2,
        img_size: int | tuple[int, int] = 224,
        token_label: bool = True,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        height, width = to_2tuple(img_size)
        if min(height, width) < 1:
            raise ValueError(f"SpectFormer: img_size must be positive, got {img_size=}")
        own: list[list[dict[str, Any]]] = [
            [{"type": "spectral_gate", "map_size": (-(-height // step), -(-width // step)), "always_float32": True}]
            if i < spectral_stages
            else [{"type": "spatial_reduction"}]
            for i, step in enumerate(4 * 2**i for i in range(len(depths)))
        ]
        norm = partial(LayerNorm, eps=1e-6)
        stages = build_stages(
            embed_dims,
            depths,
            num_heads,
            resolve_mixers(own, mixers),
            downsample=partial(ConvNorm, kernel_size=3, stride=2, padding=1, norm_layer=LayerNorm),
            block=[partial(Block, mlp_ratio=ratio, mlp_layer=ConvMlp, norm_layer=norm) for ratio in mlp_ratios],
            stage_norm=norm,
            drop_path_rate=drop_path_rate,
        )
        stages[-1].norm = nn.Identity()  # the head normalizes, after the class token's block
        conv = partial(ConvNorm, bias=False, norm_layer=nn.BatchNorm2d)
        super().__init__(
            stem=Stem(
                conv(in_chans, stem_dim, 7, 2, 3),
                nn.ReLU(),
                conv(stem_dim, stem_dim, 3, 1, 1),
                nn.ReLU(),
                conv(stem_dim, stem_dim, 3, 1, 1),
                nn.ReLU(),
                ConvNorm(stem_dim, embed_dims[0], 3, 2, 1, norm_layer=LayerNorm),
            ),
            stages=stages,
            embed_dims=embed_dims,
            head_layer=partial(
                ClassAttentionHead, num_heads=num_heads[-1], mlp_ratio=mlp_ratios[-1], token_label=token_label
            ),
            in_chans=in_chans,
            **head,
        )

    def init_weights(self) -> None:
        """Initialize as released: convolutions too, normal by their fan-out."""
        super().init_weights()
        init_by_fan_out(self)

    def absent(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that this model was built or pruned without."""
        return super().absent() + (
            () if isinstance(getattr(self.head, "fc_aux", None), nn.Linear) else ("head.fc_aux.",)
        )


class SpectralBlock(TokenBlock):
    """Block with one residual around mixer and MLP; tokens that pass by the mixer only meet the MLP."""

    def forward(self, tokens: Tokens) -> Tokens:  # type: ignore[override]
        """Take the tokens through the block; their number and size stay."""
        if self.mixer is None:
            return self.mix_channels(tokens)
        normalized = replaced(tokens, x=self.norm1(tokens.x))
        return self.mix_channels(tokens, self.norm2(mix_tokens(self.mixer, normalized)))


class PlainSpectFormer(Isotropic):
    """SpectFormer of one width.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: attention heads.
        spectral_depth: how many blocks come first that filter frequencies; full attention follows.
        mlp_ratio: hidden width of the MLPs over the channels.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which filters and positions are made.
        class_token: have a class token, without position, which joins before the first block of attention.
        reg_tokens: number of register tokens, which join there, too.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if `spectral_depth` is out of range, or leaves no attention for tokens that are not the map's.
    """

    POOL = "avg"
    CHECKPOINT_KEYS = {"authors": [(r"\.filter\.", ".mixer."), *VIT_KEYS]}

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 384,
        num_heads: int = 6,
        spectral_depth: int = 4,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = False,
        reg_tokens: int = 0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        if not 0 <= spectral_depth <= depth - (class_token or reg_tokens > 0):
            raise ValueError(
                f"PlainSpectFormer: spectral_depth must be from 0 to {depth=}, and less where there are prefix tokens, "
                f"which need a block of attention; got {spectral_depth=}, {class_token=} and {reg_tokens=}"
            )
        attention = depth - spectral_depth
        spectral = {"type": "spectral_gate", "map_size": map_size(img_size, patch_size), "always_float32": True}
        norm = partial(LayerNorm, eps=1e-6)
        form: dict[str, Any] = {"mlp_ratio": mlp_ratio, "norm_layer": norm}
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [spectral] * spectral_depth + [{"type": "full", "qkv_bias": True}] * attention,
                mixers,
                block=[partial(SpectralBlock, **form)] * spectral_depth + [partial(TokenBlock, **form)] * attention,
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            class_token=class_token,
            reg_tokens=reg_tokens,
            prefix_at=spectral_depth,
            positions="map",
            norm=norm(embed_dim),
            in_chans=in_chans,
            **head,
        )


_README = "hierarchical_architecture/README.md of badripatro/SpectFormers"
_PRODUCTS = ("gmacs",)
_NO_WEIGHTS = "the authors published none"

VARIANTS = {
    "zoo_spectformer_h_s": Variant(
        {}, Published(22.2, 3.9, 84.3, source=_README, explained=_PRODUCTS), no_weights=_NO_WEIGHTS
    ),
    "zoo_spectformer_h_b": Variant(
        {"depths": (3, 4, 12, 3), "embed_dims": (64, 128, 320, 512), "num_heads": (2, 4, 10, 16), "stem_dim": 64},
        Published(33.1, 6.3, 85.0, source=_README, explained=_PRODUCTS),
        no_weights=_NO_WEIGHTS,
    ),
    "zoo_spectformer_h_l": Variant(
        {"depths": (3, 6, 18, 3), "embed_dims": (96, 192, 384, 512), "num_heads": (3, 6, 12, 16), "stem_dim": 64},
        Published(54.7, 12.7, 85.7, source=_README, explained=_PRODUCTS),
        no_weights=_NO_WEIGHTS,
    ),
}
_PLAIN_README = "vanilla_architecture/README.md of badripatro/SpectFormers"
PLAIN = {
    "zoo_spectformer_t": Variant(
        {"embed_dim": 256, "num_heads": 4}, Published(9, 1.8, 76.9, source=_PLAIN_README), no_weights=_NO_WEIGHTS
    ),
    "zoo_spectformer_xs": Variant(
        {}, Published(22, 4.0, 80.2, source=_PLAIN_README, explained=("params_m",)), no_weights=_NO_WEIGHTS
    ),
    "zoo_spectformer_s": Variant({"depth": 19}, Published(32, 6.6, 81.7, source=_PLAIN_README), no_weights=_NO_WEIGHTS),
    "zoo_spectformer_b": Variant(
        {"depth": 19, "embed_dim": 512, "num_heads": 8},
        Published(57, 11.5, 82.1, source=_PLAIN_README),
        no_weights=_NO_WEIGHTS,
    ),
    "zoo_spectformer_l": Variant(
        {"embed_dim": 768, "num_heads": 12},
        Published(77.8, source="vanilla_architecture/logs/spectformer-b/log.txt of badripatro/SpectFormers"),
        no_weights=_NO_WEIGHTS,
    ),
}

TINY: dict[str, Mapping[str, Any]] = {
    "zoo_spectformer_xs": {"depth": 3, "embed_dim": 16, "num_heads": 2, "spectral_depth": 2, "img_size": 64},
    "zoo_spectformer_h_s": {
        "depths": (1, 1, 1, 1),
        "embed_dims": (8, 16, 16, 24),
        "num_heads": (1, 2, 2, 4),
        "stem_dim": 8,
        "img_size": 64,
    },
}

for model_cls, variants, cfg in (
    (
        SpectFormer,
        VARIANTS,
        {"first_conv": "stem.0.conv", "classifier": ("head.fc", "head.fc_aux"), "crop_pct": 0.96},
    ),
    (PlainSpectFormer, PLAIN, {"first_conv": "stem.conv", "pool_size": None}),
):
    register_family(
        __name__,
        model_cls,
        variants,
        tiny=TINY,
        paper_ids="arXiv:2304.06446",
        origin_url="https://github.com/badripatro/SpectFormers",
        license="unknown",
        **cfg,
    )
