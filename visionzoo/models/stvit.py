"""STViT: Vision Transformer with Super Token Sampling, CVPR 2023, https://arxiv.org/abs/2211.11167.

Facts from https://github.com/hhb072/STViT at c9ed9a4, which states no license; the code here is our own. Also called
SViT there. The models fine-tuned at 384 px are the same networks. Attention between super tokens is plain attention in
the last two stages, whose cells hold one token. The fixed kernels of ones that the authors keep as tensors
(`unfold.weights`, `fold.weights`) are no weights here. As released the activation comes before the norm in the stem,
and the classifier sees a map of 1024 channels, which belongs to the head here: `global_pool=""` gives the map before.
The authors' arguments `qk_scale` and dropout, which no released model sets, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.heads import ProjectionHead
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.mlp import ConvMlp
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import Stem
from visionzoo.models._pyramid import Pyramid, build_stages
from visionzoo.models._registry import Published, Variant, register_family


class ActNormStem(Stem):
    """Convolutions, each followed by its activation and batch norm; all take [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to [B, C, H', W'], in channels_last memory."""
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self:
            x = layer(x)
        return x


class STViT(Pyramid):
    """STViT.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        token_sizes: side of the cells of super tokens, in tokens, for each stage; 1 for plain attention.
        num_iterations: how often tokens are associated with super tokens, for each stage.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        layer_scales: initial value of the scale of both branches for each stage; None for no scale.
        projection: channels of the head's 1×1 convolution.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    UNFOLDED = r"^stem\.(2|5|8|11)$"  # before convolutions that pad
    CHECKPOINT_KEYS = {
        "authors": [
            (r"\.(un)?fold\.weights$", None),
            (r"^patch_embed\.proj\.", "stem."),
            (r"^layers\.(\d)\.downsample\.proj\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
            (r"^layers\.(\d)\.downsample\.proj\.1\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
            (r"^layers\.(\d)\.", r"stages.\1."),
            (r"\.pos_embed\.conv\.", ".cpe1."),
            (r"\.norm1\.norm\.", ".norm1."),
            (r"\.attn\.stoken_refine\.", ".mixer.refine."),
            (r"\.mlp2\.conv\.conv\.", ".mlp.dwconv."),
            (r"\.mlp2\.", ".mlp."),
            (r"\.gamma_([12])$", r".ls\1.gamma"),
            (r"^proj\.", "head.proj.conv."),
            (r"^norm\.", "head.proj.norm."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 5, 9, 3),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        token_sizes: Sequence[int | tuple[int, int]] = (8, 4, 1, 1),
        num_iterations: Sequence[int] = (1, 1, 1, 1),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scales: Sequence[float | None] = (None, None, None, None),
        projection: int = 1024,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        own = [
            [{"type": "super_token", "token_size": size, "num_iterations": iterations, "qkv_bias": qkv_bias}]
            for size, iterations in zip(token_sizes, num_iterations, strict=False)
        ]
        block = partial(
            Block,
            mlp_ratio=mlp_ratio,
            norm_layer=partial(LayerNorm, eps=1e-6),
            mlp_norm_layer=nn.BatchNorm2d,
            act_layer=nn.Identity,
            mlp_layer=partial(ConvMlp, first_act_layer=nn.GELU, residual=True),
            cpe_kernels=(3, None),
        )
        stem: list[nn.Module] = []
        stem_dims = (in_chans, embed_dims[0] // 2, embed_dims[0] // 2, embed_dims[0], embed_dims[0])
        for (in_dim, out_dim), stride in zip(pairwise(stem_dims), (2, 1, 2, 1), strict=True):
            stem += [nn.Conv2d(in_dim, out_dim, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(out_dim)]
        super().__init__(
            stem=ActNormStem(*stem),
            stages=build_stages(
                embed_dims,
                depths,
                num_heads,
                resolve_mixers(own[: len(depths)], mixers),
                downsample=partial(ConvNorm, kernel_size=3, stride=2, padding=1, norm_layer=nn.BatchNorm2d),
                block=[partial(block, layer_scale=scale) for scale in layer_scales],
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            head_layer=partial(ProjectionHead, hidden_features=projection),
            in_chans=in_chans,
            **head,
        )

    def init_weights(self) -> None:
        """Leave torch's initial values to all but the classifier, as released."""
        if isinstance(self.head.fc, nn.Linear):
            nn.init.trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)


_README = "README.md of hhb072/STViT"
_CLOUD = "the authors' are linked in https://github.com/hhb072/STViT#test"
_SCALES = (None, None, 1e-6, 1e-6)

VARIANTS = {
    "zoo_stvit_s": Variant({}, Published(25, 4.4, 83.6, source=_README), no_weights=_CLOUD),
    "zoo_stvit_b": Variant(
        {
            "depths": (4, 6, 14, 6),
            "embed_dims": (96, 192, 384, 512),
            "num_heads": (2, 3, 6, 8),
            "layer_scales": _SCALES,
        },
        Published(52, 9.9, 84.8, source=_README),
        no_weights=_CLOUD,
    ),
    "zoo_stvit_l": Variant(
        {
            "depths": (4, 7, 19, 8),
            "embed_dims": (96, 192, 448, 640),
            "num_heads": (2, 3, 7, 10),
            "layer_scales": _SCALES,
        },
        Published(95, 15.6, 85.3, source=_README),
        no_weights=_CLOUD,
    ),
}

TINY = {"zoo_stvit_s": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}}

register_family(
    __name__,
    STViT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0",
    paper_ids="arXiv:2211.11167",
    origin_url="https://github.com/hhb072/STViT",
    license="unknown",
)
