"""TNT: Transformer in Transformer, NeurIPS 2021, https://arxiv.org/abs/2103.00112.

Facts from https://github.com/huawei-noah/Efficient-AI-Backbones (tnt_pytorch) at f90e129 (Apache-2.0); the code here is
our own. As released each patch is convolved by itself, with zeros around it, and its pixels see no other patch's. The
authors' parameter `outer_tokens`, which nothing reads, is left out, and so are their arguments `qk_scale` and dropout
other than that of the classifier, which no released model sets. timm's `tnt_s_legacy_patch16_224` is another
network: it convolves the whole image; PyramidTNT, of the authors' same folder, is not here. Where we differ: images of
any size and shape are taken, padded to whole patches and with positions interpolated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.layers import Mlp
from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.mixers.full import FullMixer
from visionzoo.layers.mlp import SqueezeExciteMlp
from visionzoo.layers.nhwc import on_nchw
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.position import PositionTable
from visionzoo.layers.stem import PixelsToTokens, cut_patches
from visionzoo.layers.tokens import TokenBlock, Tokens
from visionzoo.models._isotropic import Isotropic, build_blocks
from visionzoo.models._registry import Published, Variant, register_family


class TokensAndPixels(NamedTuple):
    """Tokens of patches, and a small map inside each patch."""

    tokens: Tokens
    pixels: Tensor  # [B·N, h, w, C'], of the N patches row by row


class PixelPositions(PositionTable):
    """Positions inside a patch, the same for all patches."""

    NO_WEIGHT_DECAY = ("table",)

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's table, the authors' [1, h·w, C'] or timm's [1, C', h, w], to the size of ours."""
        if weight.ndim == 4 and weight.shape[1] == self.table.shape[-1]:
            weight = weight.permute(0, 2, 3, 1)
        return super().fit_weight(name, weight)


class PixelStem(nn.Module):
    """Convolution of each patch by itself, and positions inside the patches.

    Args:
        in_chans: image channels.
        dim: channels C of the tokens.
        inner_dim: channels C' of the pixels.
        patch_size: side of the patches in image pixels.
        stride: image pixels to a side of one of the patch's pixels.
    """

    def __init__(self, in_chans: int, dim: int, inner_dim: int, patch_size: int, stride: int):
        super().__init__()
        side = -(-patch_size // stride)
        self.patch_size = patch_size
        self.conv = nn.Conv2d(in_chans, inner_dim, 7, stride, 3)
        self.positions = PixelPositions(inner_dim, side)
        self.to_tokens = PixelsToTokens(side * side, inner_dim, dim, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to the pixels [B, H', W', h, w, C'] of its patches, filled up with zeros."""
        x = cut_patches(image, self.patch_size)
        pixels = self.positions(on_nchw(self.conv, x.flatten(0, 2)))
        return pixels.unflatten(0, x.shape[:3])


class TNTBlock(TokenBlock):
    """Block of the pixels, what it adds to the tokens, block of the tokens.

    Args:
        dim: channels C of the tokens.
        mixer: token mixer.
        inner: block of the pixels, [B·N, h, w, C'].
        to_tokens: pixels [B, H', W', h, w, C'] to what the map's tokens get [B, H', W', C].
        options: see `visionzoo.layers.block.Block`.
    """

    def __init__(self, dim: int, mixer: nn.Module, *, inner: nn.Module, to_tokens: nn.Module, **options: Any):
        super().__init__(dim, mixer, **options)
        self.inner = inner
        self.to_tokens = to_tokens

    def forward(self, state: TokensAndPixels) -> TokensAndPixels:  # type: ignore[override]
        """Take tokens and pixels through the block; their numbers and sizes stay."""
        tokens, pixels = state.tokens, self.inner(state.pixels)
        added = self.to_tokens(pixels.unflatten(0, (tokens.x.shape[0], *tokens.size)))
        return TokensAndPixels(super().forward(tokens.with_map(tokens.map() + added)), pixels)


class TNT(Isotropic):
    """TNT. Features are the maps of tokens, as timm's.

    Args:
        depth: blocks.
        embed_dim: channels of the tokens.
        num_heads: attention heads of the tokens.
        inner_dim: channels of the pixels.
        inner_heads: attention heads of the pixels.
        inner_stride: image pixels to a side of one of a patch's pixels.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        squeeze_excite: weigh the output of the tokens' MLPs, see `SqueezeExciteMlp` (the authors' `se`, unreleased).
        patch_size: side of the patches in image pixels.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        class_token: have a class token.
        reg_tokens: number of register tokens beside it.
        mixers: other mixers of the tokens for some blocks, see `visionzoo.layers.mixers.resolve_mixers`; the pixels of
            a patch always attend to each other.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block, tokens and pixels.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    _SHARED = [
        (r"^cls_token$", "prefix.cls_token"),
        (r"\.qk\.(weight|bias)$", r".qkv.\1#0"),
        (r"\.v\.(weight|bias)$", r".qkv.\1#1"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^outer_tokens$", None),
            (r"^outer_pos$", "positions.table"),
            (r"^inner_pos$", "stem.positions.table"),
            (r"^patch_embed\.proj\.", "stem.conv."),
            (r"^proj", "stem.proj"),
            (r"\bproj_norm(\d)\.", r"to_tokens.norm\1."),
            (r"^(stem|blocks\.\d+)\.proj\.", r"\1.to_tokens.proj."),
            (r"\.inner_(norm\d|mlp)\.", r".inner.\1."),
            (r"\.inner_attn\.", ".inner.mixer."),
            (r"\.outer_(norm\d|mlp)\.", r".\1."),
            (r"\.outer_attn\.", ".mixer."),
            (r"\.se_layer\.fc\.", ".mlp.excite."),
            *_SHARED,
        ],
        "timm": [
            (r"^patch_pos$", "positions.table"),
            (r"^pixel_pos$", "stem.positions.table"),
            (r"^pixel_embed\.proj\.", "stem.conv."),
            (r"^(proj|norm\d_proj)\.", r"stem.\1."),
            (r"\bnorm(\d)_proj\.", r"to_tokens.norm\1."),
            (r"^(stem|blocks\.\d+)\.proj\.", r"\1.to_tokens.proj."),
            (r"\.norm_in\.", ".inner.norm1."),
            (r"\.norm_mlp_in\.", ".inner.norm2."),
            (r"\.attn_in\.", ".inner.mixer."),
            (r"\.mlp_in\.", ".inner.mlp."),
            (r"\.norm_out\.", ".norm1."),
            (r"\.norm_mlp\.", ".norm2."),
            (r"\.attn_out\.", ".mixer."),
            *_SHARED,
        ],
    }

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 384,
        num_heads: int = 6,
        inner_dim: int = 24,
        inner_heads: int = 4,
        inner_stride: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        squeeze_excite: bool = False,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        reg_tokens: int = 0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        stem = PixelStem(in_chans, embed_dim, inner_dim, patch_size, inner_stride)

        def block(dim: int, mixer: nn.Module, *, drop_path: float) -> TNTBlock:
            options = {"mlp_ratio": mlp_ratio, "drop_path": drop_path}
            pixels = FullMixer(inner_dim, inner_heads, qkv_bias=qkv_bias)
            side = stem.positions.table.shape[1]
            return TNTBlock(
                dim,
                mixer,
                inner=Block(inner_dim, pixels, **options),  # type: ignore[arg-type]
                to_tokens=PixelsToTokens(side * side, inner_dim, dim),
                mlp_layer=SqueezeExciteMlp if squeeze_excite else Mlp,
                **options,
            )

        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [{"type": "full", "qkv_bias": qkv_bias}] * depth,
                mixers,
                block=block,
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            img_size=img_size,
            stem=stem,
            class_token=class_token,
            reg_tokens=reg_tokens,
            norm=LayerNorm(embed_dim),
            in_chans=in_chans,
            **head,
        )

    def begin(self, image: Tensor) -> Any:
        """Image [B, in_chans, H, W] to tokens and pixels before the first block."""
        stem: Any = self.stem
        pixels = stem(image)
        return TokensAndPixels(self.join(Tokens.of(stem.to_tokens(pixels))), pixels.flatten(0, 2))

    def read(self, i: int, state: Any, norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the tokens' map and the prefix tokens, normalized on request."""
        return super().read(i, state.tokens, norm)

    def finish(self, state: Any) -> Any:
        """Normalize the tokens: [B, P + N, C]."""
        return super().finish(state.tokens)


_SOURCE = "readme.md of tnt_pytorch in huawei-noah/Efficient-AI-Backbones"

VARIANTS = {
    "zoo_tnt_s": Variant(
        {},
        Published(23.8, 5.2, 81.5, source=_SOURCE),
        {"tag": "in1k", "hf_hub_id": "timm/tnt_s_patch16_224.in1k"},
    ),
    "zoo_tnt_b": Variant(
        {"embed_dim": 640, "num_heads": 10, "inner_dim": 40},
        Published(65.6, 14.1, 82.9, source=_SOURCE),
        {"tag": "in1k", "hf_hub_id": "timm/tnt_b_patch16_224.in1k"},
    ),
}

TINY = {"zoo_tnt_s": {"depth": 2, "embed_dim": 16, "num_heads": 2, "inner_dim": 8, "inner_heads": 2}}

register_family(
    __name__,
    TNT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    crop_pct=0.9,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    paper_ids="arXiv:2103.00112",
    origin_url="https://github.com/huawei-noah/Efficient-AI-Backbones",
    license="apache-2.0",
)
