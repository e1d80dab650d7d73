"""SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design, CVPR 2024, https://arxiv.org/abs/2401.16456.

Facts from https://github.com/ysj9909/SHViT at 6a729cc (MIT license); the code here is our own. The authors' residual
depthwise convolution is the first part of our blocks, and what they do before and after a map shrinks is a block
without token mixing. Stochastic depth is ours; the authors train without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import SqueezeExcite
from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm, DepthwiseConvNorm, LinearNorm, LinearNormMlp
from visionzoo.layers.heads import BatchNormHead
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.nhwc import on_nchw
from visionzoo.layers.stem import conv_stem
from visionzoo.models._pyramid import Pyramid, build_stages, per_stage
from visionzoo.models._registry import Published, Variant, register_family

_NONE = {"type": "none"}


class PatchMerging(nn.Module):
    """Halve a map by a wide depthwise convolution with squeeze-and-excitation, between linear layers.

    Args:
        in_dim: channels in.
        out_dim: channels out.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        hidden = 4 * in_dim
        self.fc1 = LinearNorm(in_dim, hidden)
        self.conv = ConvNorm(hidden, hidden, 3, 2, 1, groups=hidden, bias=False, norm_layer=nn.BatchNorm2d)
        self.act = nn.ReLU()
        self.se = SqueezeExcite(hidden, rd_ratio=0.25)
        self.fc2 = LinearNorm(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, ⌈H/2⌉, ⌈W/2⌉, out_dim]."""
        return self.fc2(on_nchw(self.se, self.act(self.conv(self.act(self.fc1(x))))))


class SHViT(Pyramid):
    """SHViT.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        partial_dims: channels that attend in each stage; 0 for a stage without attention.
        qk_dim: width of queries and keys; or one for each stage.
        mlp_ratio: hidden width of the MLPs over the channels.
        distilled: have a second classifier, which learns from a teacher after `set_distilled_training()`.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if the first width is too small for the stem, or the numbers of stages and of `qk_dim` differ.
    """

    FEATURES = 3

    _COMMON_KEYS = [
        (r"^patch_embed\.(\d)\.c\.", r"stem.\1.conv."),
        (r"^patch_embed\.", "stem."),
        (r"\.conv\.m\.c\.", ".cpe1.conv."),
        (r"\.conv\.m\.", ".cpe1."),
        (r"\.mixer\.m\.pre_norm\.", ".mixer.norm."),
        (r"\.mixer\.m\.proj\.1\.", ".mixer.proj."),
        (r"\.mixer\.m\.", ".mixer."),
        (r"\.ffn\.m\.", ".mlp."),
        (r"\.pw([12])\.", r".fc\1."),
        (r"^head\.l\.", "head.fc."),
        (r"^head_dist\.l\.", "head.fc_dist."),
        (r"^head_dist\.bn\.", "head.norm_dist."),
        (r"\.downsample\.1\.conv1\.", ".downsample.1.fc1."),
        (r"\.downsample\.1\.conv2\.c\.", ".downsample.1.conv.conv."),
        (r"\.downsample\.1\.conv2\.", ".downsample.1.conv."),
        (r"\.downsample\.1\.conv3\.", ".downsample.1.fc2."),
        (r"\.cpe1\.c\.", ".cpe1.conv."),
        (r"\.c\.", ".linear."),
        (r"\.bn\.", ".norm."),
    ]
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^blocks1\.", "stages.0.blocks."),
            (r"^blocks([23])\.([02])\.0\.m\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.{m[2]}.cpe1."),
            (r"^blocks([23])\.([02])\.1\.m\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.{m[2]}.mlp."),
            (r"^blocks([23])\.1\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.1."),
            (r"^blocks([23])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 3}."),
            *_COMMON_KEYS,
        ],
        "timm": [
            (r"\.downsample\.2\.", ".downsample.1."),
            (r"\.downsample\.1\.m\.", ".downsample.0.mlp."),
            (r"\.downsample\.0\.m\.", ".downsample.0.cpe1."),
            (r"\.downsample\.3\.m\.", ".downsample.2.cpe1."),
            (r"\.downsample\.4\.m\.", ".downsample.2.mlp."),
            *_COMMON_KEYS,
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 4, 5),
        embed_dims: Sequence[int] = (128, 224, 320),
        partial_dims: Sequence[int] = (0, 48, 68),
        qk_dim: int | Sequence[int] = 16,
        mlp_ratio: float = 2.0,
        distilled: bool = False,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        qk_dims = per_stage(type(self).__name__, depths, qk_dim=qk_dim)
        own = [
            [{"type": "single_head", "qk_dim": narrow, "zero_init": True, "partial_dim": width} if width else _NONE]
            for narrow, width in zip(qk_dims, partial_dims, strict=False)
        ]
        block = partial(
            Block,
            mlp_ratio=mlp_ratio,
            norm_layer=nn.Identity,  # mixer and MLP have their own
            act_layer=nn.ReLU,
            mlp_layer=LinearNormMlp,
            cpe_kernels=(3, None),
        )

        def shrink(in_dim: int, out_dim: int) -> nn.Module:
            before, after = (block(dim, None, cpe_layer=DepthwiseConvNorm) for dim in (in_dim, out_dim))
            return nn.Sequential(before, PatchMerging(in_dim, out_dim), after)

        if embed_dims[0] < 8:
            raise ValueError(f"SHViT: embed_dims must begin with 8 or more (the stem has an eighth), got {embed_dims=}")
        stem_dims = [embed_dims[0] // ratio for ratio in (8, 4, 2, 1)]
        super().__init__(
            stem=conv_stem(in_chans, stem_dims, 3, (2, 2, 2, 2), nn.ReLU, last_act=False),
            stages=build_stages(
                embed_dims,
                depths,
                [None] * len(depths),
                resolve_mixers(own, mixers),
                downsample=shrink,
                block=partial(block, cpe_layer=partial(DepthwiseConvNorm, norm_weight=0.0)),
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            reduction=16,
            head_layer=partial(BatchNormHead, distilled=distilled),
            in_chans=in_chans,
            **head,
        )

    def init_weights(self) -> None:
        """Leave torch's initial values to the linear layers, which batch norms follow; the head has its own."""


def _weights(size: str, **cfg: Any) -> dict[str, Any]:
    return {"tag": "in1k", "hf_hub_id": f"timm/shvit_{size}.in1k", **cfg}


_README = "README.md of ysj9909/SHViT"

VARIANTS = {
    "zoo_shvit_s1": Variant({}, Published(6.3, 0.241, 72.8, source=_README), _weights("s1")),
    "zoo_shvit_s2": Variant(
        {"embed_dims": (128, 308, 448), "partial_dims": (0, 66, 96)},
        Published(11.4, 0.366, 75.2, source=_README),
        _weights("s2"),
    ),
    "zoo_shvit_s3": Variant(
        {"depths": (3, 5, 5), "embed_dims": (192, 352, 448), "partial_dims": (0, 75, 96)},
        Published(14.2, 0.601, 77.4, source=_README),
        _weights("s3"),
    ),
    "zoo_shvit_s4": Variant(
        {"depths": (4, 7, 6), "embed_dims": (224, 336, 448), "partial_dims": (0, 72, 96)},
        Published(16.5, 0.986, 79.4, 256, _README),
        _weights("s4", input_size=(3, 256, 256)),
    ),
}

TINY = {"zoo_shvit_s1": {"depths": (1, 1, 1), "embed_dims": (16, 16, 24), "partial_dims": (0, 4, 6)}}

register_family(
    __name__,
    SHViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    pool_size=(4, 4),
    paper_ids="arXiv:2401.16456",
    origin_url="https://github.com/ysj9909/SHViT",
    license="mit",
)
