"""L²ViT: The Linear Attention Resurrection in Vision Transformer, 2025, https://arxiv.org/abs/2501.16182.

Facts from https://github.com/ChuanyangZheng/L2ViT at fad0341 (MIT license); the code here is our own. Blocks attend
inside windows and, linearly, to the whole map in turn; the latter have two 7×7 convolutions behind attention (the
authors' local concentration module) where the former have a second position encoding. `mixers="window"` and
`mixers="clamped_linear"` give the authors' `block_type` "local" and "enhanced_vit". Their scale of layers is accepted
and unused. Options of theirs that no published network has are not here: another stem (`conv_stem_type`,
`stem_overlapped`), overlapping merging, an activation in the position encodings, a projection before the head. Images
are padded to a multiple of 4 pixels first. Norms of the maps that only their detection and segmentation backbones have
(`norm0` to `norm3`) are left out when those checkpoints are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.mixers.clamped_linear import ClampedLinearMixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC, on_nchw
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_multiple
from visionzoo.layers.stem import Stem
from visionzoo.models._pyramid import Pyramid, build_stages, doubling
from visionzoo.models._registry import Published, Variant, register_family


class LocalConcentration(nn.Module):
    """Pre-norm residual branch of two depthwise convolutions around GELU and batch norm, on [B, H, W, C].

    Args:
        dim: channels C.
        kernel_size: side of the kernels, odd.
        drop_path: probability in [0, 1) with which a sample skips the branch in training.
    """

    def __init__(self, dim: int, kernel_size: int = 7, drop_path: float = 0.0):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.conv1 = DepthwiseConvNHWC(dim, kernel_size)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = DepthwiseConvNHWC(dim, kernel_size)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C], added to `residual`."""
        return residual + self.drop_path(self.conv2(on_nchw(self.bn, self.act(self.conv1(self.norm(x))))))


class PaddedStem(Stem):
    """Layers that quarter an image, after zeros at its bottom and right until 4 divides it."""

    def forward_map(self, x: Tensor) -> Tensor:
        """[B, H, W, in_chans] to [B, ⌈H/4⌉, ⌈W/4⌉, C]."""
        return super().forward_map(pad_to_multiple(x, (4, 4)))


def _block(dim: int, mixer: nn.Module | None, *, drop_path: float, **options: Any) -> Block:
    linear = isinstance(mixer, ClampedLinearMixer)
    block = Block(dim, mixer, drop_path=drop_path, cpe_kernels=(3, None if linear else 3), **options)
    if linear:
        block.cpe2 = LocalConcentration(dim, drop_path=drop_path)
    return block


class L2ViT(Pyramid):
    """L²ViT.

    Args:
        depths: blocks of each stage, which attend inside windows and linearly in turn.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        window_size: side of the windows, in tokens.
        mlp_ratios: hidden width of the MLPs over the channels, for each stage.
        conv_stem: two overlapping convolutions as the stem; else one of 4×4 patches.
        qkv_bias: whether the projections to q, k, v have a bias.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    INIT_CONVS = True
    UNFOLDED = r"\.cpe2\.bn$"  # between an activation and a convolution that pads
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^norm\d\.", None),
            (r"^downsample_layers\.0\.proj\.proj\.0\.", "stem.0.conv."),
            (r"^downsample_layers\.0\.proj\.proj\.1\.", "stem.0.norm."),
            (r"^downsample_layers\.0\.proj\.proj\.3\.", "stem.2.conv."),
            (r"^downsample_layers\.0\.proj\.proj\.4\.", "stem.2.norm."),
            (r"^downsample_layers\.0\.proj\.(weight|bias)$", r"stem.0.conv.\1"),
            (r"^downsample_layers\.0\.norm\.", "stem.norm."),
            (r"^downsample_layers\.(\d)\.proj\.", r"stages.\1.downsample.conv."),
            (r"^downsample_layers\.(\d)\.norm\.", r"stages.\1.downsample.norm."),
            (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.cpe\.0\.proj\.", ".cpe1."),
            (r"\.cpe\.1\.proj\.", ".cpe2."),
            (r"\.norm3\.", ".cpe2.norm."),
            (r"\.local_mp\.", ".cpe2."),
            (r"\.attn\.", ".mixer."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratios: Sequence[float] = (4.0, 4.0, 4.0, 4.0),
        conv_stem: bool = True,
        qkv_bias: bool = True,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        window = {"type": "window", "window_size": window_size, "qkv_bias": qkv_bias}
        linear = {"type": "clamped_linear", "qkv_bias": qkv_bias}
        dim = embed_dims[0]
        stem = PaddedStem(ConvNorm(in_chans, dim, 4, 4))
        if conv_stem:
            stem = PaddedStem(
                ConvNorm(in_chans, dim // 2, 3, 2, 1, norm_layer=nn.BatchNorm2d),
                nn.ReLU(),
                ConvNorm(dim // 2, dim, 3, 2, 1, norm_layer=nn.BatchNorm2d),
            )
        stem.add_module("norm", LayerNorm(dim))
        super().__init__(
            stem=stem,
            stages=build_stages(
                embed_dims,
                depths,
                num_heads,
                resolve_mixers([[window, linear]] * len(depths), mixers),
                downsample=partial(
                    ConvNorm, kernel_size=2, stride=2, norm_layer=LayerNorm, norm_first=True, pad_to_stride=True
                ),
                block=[partial(_block, mlp_ratio=ratio) for ratio in mlp_ratios],
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            norm=LayerNorm(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )


def _no_weights(size: str) -> str:
    url = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0"
    return f"timm has none; the authors' are at {url}/L2ViT-{size}.pth"


_README = "readme.md of ChuanyangZheng/L2ViT"
_BASE = doubling(128, (2, 2, 18, 2))

VARIANTS = {
    "zoo_l2vit_t": Variant(
        {}, Published(29, 4.7, 83.1, source=_README), no_weights=_no_weights("Tiny-checkpoint-best-ema")
    ),
    "zoo_l2vit_s": Variant(
        {"depths": (2, 2, 18, 2)},
        Published(50, 9.0, 84.1, source=_README),
        no_weights=_no_weights("Small-checkpoint-best-ema"),
    ),
    "zoo_l2vit_b": Variant(
        _BASE, Published(89, 15.9, 84.4, source=_README), no_weights=_no_weights("Base-checkpoint-best-ema")
    ),
    "zoo_l2vit_b_384": Variant(
        {**_BASE, "window_size": 12},
        Published(89, 47.5, 87.0, 384, f"{_README}, pre-trained on ImageNet-22K"),
        {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0},
        no_weights=_no_weights("Base-22k21k-finetune-384-checkpoint-best"),
    ),
}

TINY = {"zoo_l2vit_t": {"depths": (2, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}}

register_family(
    __name__,
    L2ViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    paper_ids="arXiv:2501.16182",
    origin_url="https://github.com/ChuanyangZheng/L2ViT",
    license="mit",
)
