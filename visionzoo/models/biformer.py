"""BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, https://arxiv.org/abs/2303.08810.

Facts from https://github.com/rayleizhu/BiFormer at 1697bbb (MIT license); the code here is our own. As released:
attention is scaled by the width of all heads together; the last stage attends globally with 8 heads at every size,
without qkv bias, and takes its position term from the attention's input. Where the regions do not divide a map we pad
as the authors' detection and segmentation backbones do (`mask_padding=True` leaves padding out); their classifier
refuses such maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import Stem
from visionzoo.models._pyramid import Pyramid, build_stages
from visionzoo.models._registry import Published, Variant, register_family

FULL = -2  # in `topks`: the stage attends globally, as the authors write it


_STEM_KEYS = [
    (r"^downsample_layers\.0\.0\.", "stem.0.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.0.norm."),
    (r"^downsample_layers\.0\.3\.", "stem.2.conv."),
    (r"^downsample_layers\.0\.4\.", "stem.2.norm."),
]
_BLOCK_KEYS = [
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.pos_embed\.", ".cpe1."),
    (r"\.attn\.qkv\.qkv\.", ".mixer.qkv."),
    (r"\.attn\.wo\.", ".mixer.proj."),
    (r"\.attn\.", ".mixer."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


class BiFormer(Pyramid):
    """BiFormer.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        topks: regions that each region attends to, for each stage; -2 for global attention.
        regions: regions per side of every routed stage; 7 at 224 px, the authors use 8 at 512 px and 16 on COCO.
        mlp_ratio: hidden width of the MLPs over the channels.
        swin_layout: the layout of BiFormer-STL: Swin's patches (convolutions without overlap), no depthwise
            convolution at the start of a block.
        mask_padding: leave padded tokens out of routing, attention and position term.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    UNFOLDED = r"^norm$"  # before pooling: part of the features

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^extra_norms\.", None),  # of the maps, in their dense backbones
            *_STEM_KEYS,
            (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.conv."),
            (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.norm."),
            *_BLOCK_KEYS,
        ],
        "authors (STL)": [
            *_STEM_KEYS,
            (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.norm."),
            (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.conv."),
            *_BLOCK_KEYS,
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        topks: Sequence[int] = (1, 4, 16, FULL),
        regions: int = 7,
        mlp_ratio: float = 3.0,
        swin_layout: bool = False,
        mask_padding: bool = False,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        routed = {"type": "routed", "regions": regions, "mask_padding": mask_padding}
        full = {"type": "full", "num_heads": 8, "lepe_kernel": 5}
        defaults = [[full if topk == FULL else {**routed, "topk": topk}] for topk in topks]
        conv_norm = partial(ConvNorm, norm_layer=nn.BatchNorm2d)
        if swin_layout:
            stem = Stem(conv_norm(in_chans, embed_dims[0], 4, 4))
            downsample = partial(conv_norm, kernel_size=2, stride=2, norm_first=True)
        else:
            half = embed_dims[0] // 2
            stem = Stem(conv_norm(in_chans, half, 3, 2, 1), nn.GELU(), conv_norm(half, embed_dims[0], 3, 2, 1))
            downsample = partial(conv_norm, kernel_size=3, stride=2, padding=1)
        super().__init__(
            stem=stem,
            stages=build_stages(
                embed_dims,
                depths,
                [None] * len(depths),
                resolve_mixers(defaults, mixers),
                downsample=downsample,
                block=partial(
                    Block,
                    mlp_ratio=mlp_ratio,
                    norm_layer=partial(LayerNorm, eps=1e-6),
                    cpe_kernels=(None if swin_layout else 3, None),
                    cpe_layer=DepthwiseConvNHWC,
                ),
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            norm=nn.BatchNorm2d(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )


_README = "README.md of rayleizhu/BiFormer"
_DEAD = "the authors' OneDrive links no longer answer"
_WIDE = (96, 192, 384, 768)

VARIANTS = {
    "zoo_biformer_t": Variant({"depths": (2, 2, 8, 2)}, Published(13.1, 2.2, 81.4, source=_README), no_weights=_DEAD),
    "zoo_biformer_s": Variant({"depths": (4, 4, 18, 4)}, Published(25.5, 4.5, 83.8, source=_README), no_weights=_DEAD),
    "zoo_biformer_b": Variant(
        {"depths": (4, 4, 18, 4), "embed_dims": _WIDE}, Published(56.8, 9.8, 84.3, source=_README), no_weights=_DEAD
    ),
    "zoo_biformer_stl": Variant(
        {"depths": (2, 2, 6, 2), "embed_dims": _WIDE, "mlp_ratio": 4.0, "swin_layout": True},
        Published(28.4, 4.6, 82.7, source=_README),
        no_weights=_DEAD,
    ),
}

TINY = {
    "zoo_biformer_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "regions": 2, "topks": (1, 2, 4, -2)},
    "zoo_biformer_stl": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "regions": 2, "topks": (1, 2, 4, -2)},
}

register_family(
    __name__,
    BiFormer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    paper_ids="arXiv:2303.08810",
    origin_url="https://github.com/rayleizhu/BiFormer",
    license="mit",
)
