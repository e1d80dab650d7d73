"""GMM: RetNet Viewed through Convolution, Pattern Recognition 2024, https://arxiv.org/abs/2309.05375.

Facts from https://github.com/CatworldLee/Gaussian-Mixture-Mask-Attention at b06b199, which states no license (its Swin
and T2T keep the notes of MIT and Clear BSD); the code here is our own. Attention's scores are multiplied by a learned
mixture of Gaussians of the distance, in a ViT without class token, in Swin's windows, and in the patches' blocks of
CaiT, whose class token attends to patches that no norm has seen. Models are for small images, of 32 px and, in larger
patches, of 64 px (`zoo_gmm_*_64`; the others with `img_size=64, patch_size=8`, as there). The repository's PiT and T2T,
and its masks with a weight for each pair of tokens (`is_SLM`), are not here.

Where we differ: images of any size and shape are taken, with positions interpolated and Gaussians of the distances that
there are. Theirs are powers of exp(-d²) in float32, which is 0 beyond ten patches however wide a Gaussian is; ours are
as the formula says, the same up to ten. `zoo_swin_*` and others take the attention as `mixers={"type": "gmm", ...}`.
Published accuracies are of CIFAR-10, CIFAR-100, SVHN and Tiny-ImageNet (95.06, 77.81, 98.01 and 62.27 % for the ViT),
in the repository's README and the recipe, as are parameters with 10 or 100 classes: with 1,000 the ViT has 2.9 and
Swin 7.5 million. The multiply-adds there leave out attention's products; with them the ViT has 0.2 and CaiT-tiny 0.4
billion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from visionzoo.layers.block import LayerScale
from visionzoo.layers.class_attention import ContextBlock, ContextHead
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.heads import TokenHead
from visionzoo.layers.mixers import combine_mixers
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.position import PositionTable
from visionzoo.layers.stem import PatchStem, Stem
from visionzoo.layers.tokens import TokenBlock, map_size
from visionzoo.models import swin
from visionzoo.models._isotropic import Isotropic, build_blocks
from visionzoo.models._pyramid import doubling
from visionzoo.models._registry import Published, Variant, register_family

_PATCHES = [
    (r"(^|\.)mask$", None),  # distances
    (r"^to_patch_embedding\.1\.", "stem.conv."),
    (r"^pos_embedding$", "positions.table"),
    (r"^mlp_head\.0\.", "head.norm."),
    (r"^mlp_head\.1\.", "head.fc."),
]


class GmmViT(Isotropic):
    """ViT with Gaussian mixtures.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: attention heads.
        head_dim: their width; None for embed_dim over num_heads.
        num_kernels: Gaussians of each head.
        mlp_ratio: hidden width of the MLPs over the channels.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            *_PATCHES,
            (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
            (r"^transformer\.layers\.(\d+)\.0\.fn\.to_qkv\.", r"blocks.\1.mixer.qkv."),
            (r"^transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"blocks.\1.mixer.proj."),
            (r"^transformer\.layers\.(\d+)\.0\.fn\.mask\.", r"blocks.\1.mixer.mixture."),
            (r"^transformer\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.norm2."),
            (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.0\.", r"blocks.\1.mlp.fc1."),
            (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.3\.", r"blocks.\1.mlp.fc2."),
        ]
    }

    def __init__(
        self,
        *,
        depth: int = 9,
        embed_dim: int = 192,
        num_heads: int = 12,
        head_dim: int | None = None,
        num_kernels: int = 5,
        mlp_ratio: float = 2.0,
        patch_size: int = 4,
        img_size: int | tuple[int, int] = 32,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [{"type": "gmm", "num_kernels": num_kernels, "head_dim": head_dim}] * depth,
                mixers,
                block=partial(TokenBlock, mlp_ratio=mlp_ratio),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            stem=PatchStem(in_chans, embed_dim, patch_size, channels_last=True),
            class_token=False,
            head_layer=partial(TokenHead, norm_layer=LayerNorm),
            in_chans=in_chans,
            **head,
        )


class GmmSwin(swin.SwinTransformer):
    """Swin Transformer with Gaussian mixtures in its windows, and a table of positions.

    Args:
        depths: blocks of each stage, whose windows are in place and shifted by half a window in turn.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        num_kernels: Gaussians of each head.
        window_size: side of the windows, in tokens.
        patch_size: side of the patches in pixels.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        mask_padding: leave padded tokens out of window attention.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        others: as `SwinTransformer` takes them.
    """

    FEATURES = 3
    CHECKPOINT_KEYS = {
        "authors": [
            (r"(^|\.)mask$", None),
            (r"^absolute_pos_embed$", "stem.1.table"),
            (r"^patch_embed\.proj\.", "stem.0.conv."),
            (r"^patch_embed\.norm\.", "stem.0.norm."),
            (r"\.attn\.mask\.", ".mixer.mixture."),
            *swin.SwinTransformer.CHECKPOINT_KEYS["authors"],
        ]
    }

    def __init__(
        self,
        *,
        depths: tuple[int, ...] = (2, 6, 4),
        embed_dims: tuple[int, ...] = (96, 192, 384),
        num_heads: tuple[int, ...] = (3, 6, 12),
        num_kernels: int = 5,
        window_size: int = 4,
        patch_size: int = 2,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        mask_padding: bool = False,
        img_size: int | tuple[int, int] = 32,
        mixers: Any = None,
        in_chans: int = 3,
        **others: Any,
    ):
        window = {
            "type": "gmm",
            "num_kernels": num_kernels,
            "window_size": window_size,
            "relative_position_bias": True,
            "qkv_bias": qkv_bias,
            "mask_padding": mask_padding,
        }
        super().__init__(
            depths=depths,
            embed_dims=embed_dims,
            num_heads=num_heads,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            mixers=combine_mixers([[window, {**window, "shift_size": None}]] * len(depths), mixers),
            in_chans=in_chans,
            **others,
        )
        self.stem = Stem(
            ConvNorm(in_chans, embed_dims[0], patch_size, patch_size, norm_layer=LayerNorm, pad_to_stride=True),
            PositionTable(embed_dims[0], map_size(img_size, patch_size)),
        )


class GmmCait(Isotropic):
    """CaiT with Gaussian mixtures.

    Args:
        depth: blocks of the patches.
        class_depth: blocks of the class token.
        embed_dim: channels.
        num_heads: attention heads.
        head_dim: their width.
        num_kernels: Gaussians of each head.
        mlp_ratio: hidden width of the MLPs over the channels.
        patch_size: side of the patches in pixels.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        mixers: other token mixers for some blocks of the patches, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block of the patches.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    POOL = "class"
    POOLS = ContextHead.POOLS
    CHECKPOINT_KEYS = {
        "authors": [
            *_PATCHES,
            (r"^cls_token$", "head.cls_token"),
            (r"^patch_transformer\.layers\.", "blocks."),
            (r"^cls_transformer\.layers\.", "head.blocks."),
            (r"blocks\.(\d+)\.0\.scale$", r"blocks.\1.ls1.gamma"),
            (r"blocks\.(\d+)\.1\.scale$", r"blocks.\1.ls2.gamma"),
            (r"blocks\.(\d+)\.0\.fn\.norm\.", r"blocks.\1.norm1."),
            (r"blocks\.(\d+)\.1\.fn\.norm\.", r"blocks.\1.norm2."),
            (r"blocks\.(\d+)\.1\.fn\.fn\.net\.0\.", r"blocks.\1.mlp.fc1."),
            (r"blocks\.(\d+)\.1\.fn\.fn\.net\.3\.", r"blocks.\1.mlp.fc2."),
            (r"blocks\.(\d+)\.0\.fn\.fn\.", r"blocks.\1.mixer."),
            (r"^(head\..*)\.to_(q|kv)\.", r"\1.\2."),
            (r"\.to_q\.weight$", ".qkv.weight#0"),
            (r"\.to_kv\.weight$", ".qkv.weight#1"),
            (r"\.to_out\.0\.", ".proj."),
            (r"\.mask\.", ".mixture."),
            (r"\.mix_heads_pre_attn$", ".talk_before"),
            (r"\.mix_heads_post_attn$", ".talk_after"),
        ]
    }

    def __init__(
        self,
        *,
        depth: int = 24,
        class_depth: int = 2,
        embed_dim: int = 192,
        num_heads: int = 4,
        head_dim: int = 64,
        num_kernels: int = 5,
        mlp_ratio: float = 2.0,
        patch_size: int = 4,
        img_size: int | tuple[int, int] = 32,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        own = {"type": "gmm", "num_kernels": num_kernels, "head_dim": head_dim, "talking_heads": True}
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [own] * depth,
                mixers,
                block=partial(TokenBlock, mlp_ratio=mlp_ratio, layer_scale=0.1),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            stem=PatchStem(in_chans, embed_dim, patch_size, channels_last=True),
            class_token=False,
            head_layer=partial(
                ContextHead,
                depth=class_depth,
                block=partial(ContextBlock, num_heads=num_heads, head_dim=head_dim, mlp_ratio=mlp_ratio),
            ),
            in_chans=in_chans,
            **{"global_pool": self.POOL, **head},
        )

    def init_weights(self) -> None:
        """Initialize as released: scales of the later blocks are smaller."""
        super().init_weights()
        for i, block in enumerate(self.blocks):
            for scale in block.children():
                if isinstance(scale, LayerScale):
                    nn.init.constant_(scale.gamma, 0.1 if i < 18 else 1e-5 if i < 24 else 1e-6)


_README = "readme.md of CatworldLee/Gaussian-Mixture-Mask-Attention"
_CIFAR = {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
_TINY_IMAGENET = {"input_size": (3, 64, 64), "crop_pct": 1.0}


def _variants(
    name: str, kwargs: Mapping[str, Any], published: Published | None = None, patch_at_64: int | None = None
) -> dict[str, Variant]:
    """Return a model for 32 px and, where its patches for 64 px are given, the one for these."""
    none = "none were published"
    found = {name: Variant(kwargs, replace(published or Published(), size=32), _CIFAR, no_weights=none)}
    if patch_at_64:
        at_64 = {**kwargs, "patch_size": patch_at_64, "img_size": 64}
        found[f"{name}_64"] = Variant(at_64, Published(size=64), _TINY_IMAGENET, no_weights=none)
    return found


def _vit(embed_dim: int, depth: int, num_heads: int, patch_size: int = 4) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "patch_size": patch_size}


VIT = {
    **_variants(
        "zoo_gmm_vit", _vit(192, 9, 12), Published(2.7, 0.1709, source=_README, explained=("params_m", "gmacs")), 8
    ),
    **_variants("zoo_gmm_vit_base", _vit(256, 8, 4, 2), patch_at_64=8),
    **_variants("zoo_gmm_vit_heat", _vit(192, 8, 6, 2), patch_at_64=4),
    **_variants("zoo_gmm_vit_d6", _vit(252, 6, 12)),
    **_variants("zoo_gmm_vit_d15", _vit(144, 15, 12)),
    **_variants("zoo_gmm_vit_d30", _vit(72, 30, 12)),
    **_variants("zoo_gmm_vit_d30_108", _vit(108, 30, 12)),
    **_variants("zoo_gmm_vit_d30_192", _vit(192, 30, 12)),
    **_variants("zoo_gmm_vit_d60", _vit(72, 60, 12)),
}
SWIN = _variants(
    "zoo_gmm_swin", doubling(96, (2, 6, 4)), Published(7.1, 0.2369, source=_README, explained=("params_m",)), 4
)
CAIT = {
    **_variants(
        "zoo_gmm_cait_tiny",
        {"embed_dim": 108, "mlp_ratio": 384 / 108},
        Published(5.1, 0.3059, source=_README, explained=("gmacs",)),
        8,
    ),
    **_variants("zoo_gmm_cait", {"embed_dim": 192}),
}

TINY: dict[str, dict[str, Any]] = {
    "zoo_gmm_vit": {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8},
    "zoo_gmm_swin": {"depths": (1, 2, 1), "embed_dims": (8, 16, 24), "num_heads": (1, 2, 2)},
    "zoo_gmm_cait_tiny": {"depth": 2, "embed_dim": 16, "num_heads": 2, "head_dim": 6, "patch_size": 8},
}

for model_cls, variants in ((GmmViT, VIT), (GmmSwin, SWIN), (GmmCait, CAIT)):
    register_family(
        __name__,
        model_cls,
        variants,
        tiny=TINY,
        first_conv="stem.0.conv" if model_cls is GmmSwin else "stem.conv",
        pool_size=(4, 4) if model_cls is GmmSwin else None,
        paper_ids="arXiv:2309.05375",
        origin_url="https://github.com/CatworldLee/Gaussian-Mixture-Mask-Attention",
        license="unknown",
    )
