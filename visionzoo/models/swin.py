"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, https://arxiv.org/abs/2103.14030.

Facts from https://github.com/microsoft/Swin-Transformer at f82860b (MIT license); the code here is our own. Their
classifier takes one image size; maps that the windows do not divide are padded before the shift as in their detection
and segmentation backbones, where padded tokens take part in attention. Where a map is one window at most along either
axis nothing is shifted, as in their classifier; `unshifted="none"` shifts all maps, as their dense backbones do. In
their classifier a map smaller than a window is a window: `window_size=(4, 4, 4, 2)` for 4 at 64 px. Their arguments
`ape`, `patch_norm`, `qk_scale` and dropout, which no released model sets, are left out. The weights of the other sizes
of window and image load too: the tables of position biases are resized. `zoo_swin_n` is Swin-nano of ViDT
(arXiv:2110.03921, naver-ai/vidt at a8c48b5, Apache-2.0); its 6M parameters as published are 7.3M, 6.9M without the
classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from visionzoo.layers.block import Block
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.patch_merge import PatchMerge
from visionzoo.layers.stem import ConvNormStem
from visionzoo.models._pyramid import Pyramid, build_stages, doubling, per_stage
from visionzoo.models._registry import Published, Variant, register_family


class SwinTransformer(Pyramid):
    """Swin Transformer.

    Args:
        depths: blocks of each stage, whose windows are in place and shifted by half a window in turn.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        window_size: side of the windows, in tokens; or one for each stage.
        patch_size: side of the patches in pixels.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        mask_padding: leave padded tokens out of window attention.
        unshifted: which small maps are not shifted, see `WindowMixer`.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if the numbers of stages and windows differ.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"\.(relative_position_index|attn_mask)$", None),
            (r"^norm\d\.", None),  # of the maps, in their detection and segmentation backbones
            (r"^patch_embed\.proj\.", "stem.conv."),
            (r"^patch_embed\.norm\.", "stem.norm."),
            (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
            (r"^layers\.(\d)\.", r"stages.\1."),
            (r"\.attn\.relative_position_bias_table$", ".mixer.relative_position_bias.table"),
            (r"\.attn\.", ".mixer."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
        "timm": [
            (r"\.(relative_position_index|attn_mask)$", None),
            (r"^patch_embed\.proj\.", "stem.conv."),
            (r"^patch_embed\.norm\.", "stem.norm."),
            (r"^layers\.(\d)\.", r"stages.\1."),
            (r"\.attn\.relative_position_bias_table$", ".mixer.relative_position_bias.table"),
            (r"\.attn\.", ".mixer."),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        mask_padding: bool = False,
        unshifted: str = "map",
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        windows = per_stage(type(self).__name__, depths, window_size=window_size)
        window = {
            "type": "window",
            "relative_position_bias": True,
            "qkv_bias": qkv_bias,
            "mask_padding": mask_padding,
            "unshifted": unshifted,
        }
        own = [
            [{**window, "window_size": side, "shift_size": shift} for shift in (0, None)]  # None: half a window
            for side in windows
        ]
        super().__init__(
            stem=ConvNormStem(
                in_chans, embed_dims[0], patch_size, patch_size, norm_layer=LayerNorm, pad_to_stride=True
            ),
            stages=build_stages(
                embed_dims,
                depths,
                num_heads,
                resolve_mixers(own, mixers),
                downsample=PatchMerge,
                block=partial(Block, mlp_ratio=mlp_ratio, norm_layer=LayerNorm),
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            reduction=patch_size,
            norm=LayerNorm(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )


def _weights(name: str, tag: str = "ms_in1k") -> dict[str, Any]:
    return {"tag": tag, "hf_hub_id": f"timm/swin_{name}.{tag}"}


_README = "README.md of microsoft/Swin-Transformer"
_README_22K = f"{_README}, pre-trained on ImageNet-22K"
_SMALL = (2, 2, 18, 2)
_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

VARIANTS = {
    "zoo_swin_n": Variant(
        doubling(48, (2, 2, 6, 2), (3, 6, 12, 24)),
        Published(6, None, 74.9, source="README.md of naver-ai/vidt", explained=("params_m",)),
        no_weights="timm has none; the authors' are swin_nano_patch4_window7_224.pth, a release of "
        "https://github.com/naver-ai/vidt",
    ),
    "zoo_swin_t": Variant(
        doubling(96, (2, 2, 6, 2)), Published(28, 4.5, 81.2, source=_README), _weights("tiny_patch4_window7_224")
    ),
    "zoo_swin_t_c24": Variant(
        {**doubling(96, (2, 2, 6, 2)), "num_heads": (4, 8, 16, 32), "window_size": 8},
        Published(28, 5.9, 81.6, 256, source="MODELHUB.md of microsoft/Swin-Transformer"),
        {"input_size": (3, 256, 256), "pool_size": (8, 8)},
        no_weights="timm has none; the authors' are swin_tiny_c24_patch4_window8_256.pth, a release of "
        "https://github.com/SwinTransformer/storage",
    ),
    "zoo_swin_s": Variant(
        doubling(96, _SMALL), Published(50, 8.7, 83.2, source=_README), _weights("small_patch4_window7_224")
    ),
    "zoo_swin_b": Variant(
        doubling(128, _SMALL), Published(88, 15.4, 83.5, source=_README), _weights("base_patch4_window7_224")
    ),
    "zoo_swin_b_384": Variant(
        {**doubling(128, _SMALL), "window_size": 12},
        Published(88, 47.1, 84.5, 384, _README),
        {**_weights("base_patch4_window12_384"), **_AT_384},
    ),
    "zoo_swin_l": Variant(
        doubling(192, _SMALL),
        Published(197, 34.5, 86.3, source=_README_22K),
        _weights("large_patch4_window7_224", "ms_in22k_ft_in1k"),
    ),
    "zoo_swin_l_384": Variant(
        {**doubling(192, _SMALL), "window_size": 12},
        Published(197, 103.9, 87.3, 384, _README_22K),
        {**_weights("large_patch4_window12_384", "ms_in22k_ft_in1k"), **_AT_384},
    ),
}

TINY = {"zoo_swin_t": {"depths": (1, 2, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}}

register_family(
    __name__,
    SwinTransformer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    crop_pct=0.9,  # timm's; the authors evaluate at 0.875
    paper_ids="arXiv:2103.14030",
    origin_url="https://github.com/microsoft/Swin-Transformer",
    license="mit",
)
