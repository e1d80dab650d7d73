"""FcaFormer: Forward Cross Attention in Hybrid Vision Transformer, ICCV 2023, https://arxiv.org/abs/2211.07198.

Facts from https://github.com/hkzhang-git/FcaFormer at 7dcd8e0, which states no license; the code here is our own. Two
stages of ConvNeXt blocks, then two of attention that also sees what earlier blocks of its stage left: a convolution
makes some 1/16 as many tokens of each block's map. As released for detection and segmentation, maps larger than at 224
px are cut into windows of that size, in which whole blocks run; zeros fill them up at the top and left for blocks 0, 2,
..., at the bottom and right for blocks 1, 3, .... Where we differ: each stage begins with the downsampling that the
authors' layers end with, so that features are those of their detectors, though without the 1×1 convolutions and norms
that follow there; the tables of positions and the factors of cross tokens are kept from weight decay. L0, of DeiT's
form, is not released.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from timm.layers import LayerNorm2d, NormMlpClassifierHead, to_2tuple
from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm, DepthwiseConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.outputs import recomputed
from visionzoo.layers.padding import crop, from_windows, pad_to_multiple, to_windows
from visionzoo.layers.stem import conv_stem
from visionzoo.models._pyramid import Pyramid, Stage, build_stages
from visionzoo.models._registry import Published, Variant, register_family


class CrossTokenBlock(Block):
    """`Block` on [B, H, W, C] that takes cross tokens, makes some, and has a convolution in place of its map between.

    Args:
        dim: channels C.
        mixer: token mixer; one with `cross_tokens` takes these.
        options: as `Block` takes them.
    """

    def __init__(self, dim: int, mixer: nn.Module | None, **options: Any):
        super().__init__(dim, mixer, **options)
        self.local_conv = DepthwiseConvNorm(dim, 3)
        self.merge: nn.Module | None = ConvNorm(dim, dim, 7, 4, 3, groups=dim, bias=False)

    def forward(self, x: Tensor, *cross: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """[B, H, W, C] and cross tokens [B, M, C], if any, to [B, H, W, C] and tokens [B, ⌈H/4⌉·⌈W/4⌉, C] or None."""
        x = self.mix_tokens(x, *cross)
        tokens = None if self.merge is None else self.merge(x).flatten(1, 2)
        return self.mix_channels(self.local_conv(x)), tokens


class CrossTokenStage(Stage):
    """A stage whose blocks see tokens of the blocks before them, inside windows of the map.

    Args:
        downsample: of a map [B, H, W, C_in] to [B, H', W', C].
        blocks: of class `CrossTokenBlock`.
        window: height and width of the windows; None for the whole map.
        tokens: how many cross tokens a block makes of a window.
    """

    blocks: Any

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], window: tuple[int, int] | None, tokens: int):
        super().__init__(downsample, blocks)
        self.window = window
        self.sources = [getattr(block.mixer, "cross_tokens", 0) // tokens for block in self.blocks]
        for i, block in enumerate(self.blocks):  # the last blocks' tokens would go nowhere
            if not any(self.sources[j] >= j - i for j in range(i + 1, len(self.blocks))):
                block.merge = None

    def forward_blocks(self, x: Tensor) -> Tensor:
        """Run the blocks, with gradient checkpointing where that is set."""
        made: list[Any] = []
        for i, block in enumerate(self.blocks):
            cross = [torch.cat(made[-self.sources[i] :], 1)] if self.sources[i] else []
            run = partial(recomputed, block) if self.grad_checkpointing and self.training else block
            if self.window is None:
                x, tokens = run(x, *cross)
            else:
                at_start = i % 2 == 0
                padded = pad_to_multiple(x, self.window, at_start=at_start)
                windows, tokens = run(to_windows(padded, self.window), *cross)
                x = crop(from_windows(windows, padded.shape[1:3]), x.shape[1:3], at_start=at_start)
            made.append(tokens)
        return x


class FcaFormer(Pyramid):
    """FcaFormer.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage; 0 for a stage of ConvNeXt blocks.
        max_sources: how many earlier blocks a block takes cross tokens from at most, the latest ones.
        mlp_ratio: hidden width of the MLPs over the channels.
        layer_scale: initial value of the learned scales of both branches.
        img_size: image size in pixels, or (height, width), whose maps are one window in each stage.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`. Stages without the
            family's own have neither cross tokens nor windows.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if `max_sources` is negative.
    """

    INIT_CONVS = True
    POOLS = ("", "avg", "max", "avgmax")  # the norm behind the pooling has the width of the map
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^(head|norm)[0-3]\.", None),  # after the maps, in their backbone for detection and segmentation
            (r"^patch_embed\.seq\.(\d)\.c\.", r"stem.\1.conv."),
            (r"^patch_embed\.seq\.(\d)\.bn\.", r"stem.\1.norm."),
            (
                r"^layer_(\d)\.downsample\.conv(\d)\.",
                lambda m: f"stages.{int(m[1]) + 1}.downsample.{2 * int(m[2]) - 2}.",
            ),
            (r"^layer_(\d)\.", r"stages.\1."),
            (r"\.dwconv\.", ".norm2.0."),
            (r"\.blocks\.(\d+)\.norm\.", r".blocks.\1.norm2.1."),
            (r"\.norm2\.(weight|bias)$", r".norm2.0.\1"),
            (r"\.mlp\.norm\.", ".norm2.1."),
            (r"\.pwconv([12])\.", r".mlp.fc\1."),
            (r"\.gamma$", ".ls2.gamma"),
            (r"\.gamma_([12])$", r".ls\1.gamma"),
            (r"\.s_token_bias$", ".mixer.cross_bias"),
            (r"\.s_scale_factors$", ".mixer.cross_scale"),
            (r"\.s_norm\.", ".mixer.cross_norm."),
            (r"\.attention_biases$", ".mixer.bias_table"),
            (r"\.attention_bias_idxs$", None),
            (r"\.(qkv|proj)\.", r".mixer.\1."),
            (r"\.dw_conv\.", ".merge.conv."),
            (r"\.c\.weight$", ".conv.weight"),
            (r"\.bn\.", ".norm."),
            (r"^norm_head\.", "head.norm."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ]
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (64, 128, 192, 320),
        num_heads: Sequence[int] = (0, 0, 6, 10),
        max_sources: int = 12,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        img_size: int | tuple[int, int] = 224,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        if max_sources < 0:
            raise ValueError(f"FcaFormer: max_sources must not be negative, got {max_sources=}")
        sides = to_2tuple(img_size)
        windows = [(ceil(sides[0] / 4 / 2**i), ceil(sides[1] / 4 / 2**i)) for i in range(len(depths))]
        tokens = [prod(ceil(side / 4) for side in window) for window in windows]
        own: list[list[dict[str, Any]]] = [
            [
                {"type": "forward_cross", "map_size": windows[i], "cross_tokens": min(j, max_sources) * tokens[i]}
                for j in range(depth)
            ]
            if num_heads[i]
            else [{"type": "none"}]
            for i, depth in enumerate(depths)
        ]
        specs = resolve_mixers(own, mixers)
        windowed = [any(spec["type"] == "forward_cross" for spec in stage) for stage in specs]
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale}

        def convnext_norm(dim: int) -> nn.Module:
            return nn.Sequential(DepthwiseConvNHWC(dim, 7), LayerNorm(dim, eps=1e-6))

        def two_norms(dim: int) -> nn.Module:
            return nn.Sequential(LayerNorm(dim), LayerNorm(dim))

        def downsample(in_dim: int, dim: int) -> nn.Module:
            conv = partial(ConvNorm, bias=False, norm_layer=nn.BatchNorm2d)
            depthwise = conv(dim, dim, 3, 2, 1, groups=dim)
            return nn.Sequential(conv(in_dim, dim, 1), nn.GELU(), depthwise, nn.GELU(), conv(dim, dim, 1))

        stages = build_stages(
            embed_dims,
            depths,
            [heads or None for heads in num_heads],
            specs,
            downsample=downsample,
            block=[
                partial(CrossTokenBlock, mlp_norm_layer=two_norms, **options)
                if heads
                else partial(Block, mlp_norm_layer=convnext_norm, **options)
                for heads in num_heads
            ],
            drop_path_rate=drop_path_rate,
        )
        super().__init__(
            stem=conv_stem(in_chans, (embed_dims[0] // 2, embed_dims[0]), 3, (2, 2), nn.GELU, last_act=False),
            stages=[
                CrossTokenStage(stage.downsample, list(stage.blocks), windows[i] if windowed[i] else None, tokens[i])
                if num_heads[i]
                else stage
                for i, stage in enumerate(stages)
            ],
            embed_dims=embed_dims,
            head_layer=partial(NormMlpClassifierHead, norm_layer=partial(LayerNorm2d, eps=1e-5)),
            in_chans=in_chans,
            **head,
        )


_README = "README.md of hkzhang-git/FcaFormer"

VARIANTS = {
    "zoo_fcaformer_l1": Variant({}, Published(6.2, 1.4, 80.3, source=_README)),
    "zoo_fcaformer_l2": Variant(
        {"depths": (2, 2, 7, 2), "embed_dims": (96, 192, 320, 480), "num_heads": (0, 0, 10, 15)},
        Published(16.3, 3.6, 83.1, source=_README),
        no_weights="the authors' are on pan.baidu.com, which needs an account",
    ),
    "zoo_fcaformer_l3": Variant(
        {"depths": (3, 6, 12, 3), "embed_dims": (96, 192, 320, 512), "num_heads": (0, 0, 10, 16)},
        Published(28, 6.7, 84.2, source=_README),
    ),
    "zoo_fcaformer_l4": Variant(
        {"depths": (3, 6, 12, 3), "embed_dims": (128, 256, 512, 768), "num_heads": (0, 0, 16, 24)},
        Published(66, 14.5, 84.9, source=_README),
    ),
}

TINY = {
    "zoo_fcaformer_l1": {
        "depths": (1, 1, 3, 2),
        "embed_dims": (8, 16, 16, 24),
        "num_heads": (0, 0, 2, 4),
        "img_size": 64,
    }
}

register_family(
    __name__,
    FcaFormer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    paper_ids="arXiv:2211.07198",
    origin_url="https://github.com/hkzhang-git/FcaFormer",
    license="unknown",
)
