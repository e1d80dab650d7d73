"""FFNet: MetaMixer-based Efficient Convolutional Mixer Design, 2024, https://arxiv.org/abs/2406.02021.

Facts from https://github.com/ysj9909/FFNet at f3c3e4c (Apache-2.0); the code here is our own. No attention: token
mixers are large depthwise convolutions in the form of an MLP. The models here are those that are trained;
`visionzoo.fuse` makes one convolution of the two branches of each large kernel, of norms, and of the residual in the
downsampling, as the authors' deployment does. The published parameters are of the fused networks; the first's 2.9 GMACs
are 3.0 here, fused or not. Each stage's channels are a multiple of those of the stage before it. The models fine-tuned
at 384 px are the same networks; for the fourth nothing else is published.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import Mlp, SqueezeExcite
from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import BranchedDepthwiseConv, DepthwiseConvNorm, ResidualConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.nhwc import on_nchw
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import conv_stem
from visionzoo.models._pyramid import Pyramid, build_stages
from visionzoo.models._registry import Published, Variant, register_family


class ConvFirstMlp(Mlp):
    """timm's MLP behind a depthwise convolution with batch norm, in two branches where its kernels have a side of 7.

    Args:
        dim: channels in and out.
        hidden_dim: channels between the linear layers.
        kernel_size: side of the kernels, odd.
        options: of timm's `Mlp`.
    """

    def __init__(self, dim: int, hidden_dim: int, *, kernel_size: int = 7, **options: Any):
        super().__init__(dim, hidden_dim, **options)
        branched = kernel_size == 7  # others are not, larger ones neither
        self.conv = BranchedDepthwiseConv(dim, dim, kernel_size) if branched else DepthwiseConvNorm(dim, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        return super().forward(self.conv(x))


class _SqueezeExciteAfterMixer(nn.Module):
    """Replaces `Block`'s second position encoding."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.se = SqueezeExcite(dim, 0.25)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return on_nchw(self.se, x)


class FFNet(Pyramid):
    """FFNet.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        stem_dim: channels of the stem's first convolution.
        mixer_kernels: sides of the two convolutions of the token mixers, for each stage.
        mlp_kernels: side of the convolution of the MLPs, for each stage.
        mlp_ratios: hidden width of the MLPs over the channels, for each stage.
        act_layers: activation of mixers and MLPs, for each stage.
        squeeze_excite: whether every second block, from the first, has squeeze-and-excitation behind its mixer, for
            each stage.
        layer_scale: initial value of the scale of both branches; None for no scale.
        layer_norm_last: the last norm is a layer norm, not a batch norm.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    INIT_CONVS = True
    UNFOLDED = r"^norm$"  # before pooling: part of the features
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^norm\d\.", None),  # of the maps, in their detection and segmentation backbones
            (r"^patch_embed\.", "stem."),
            (r"^stages\.0\.", "stages.0.blocks."),
            (r"^stages\.([123])\.0\.proj\.", r"stages.\1.downsample."),
            (r"^stages\.([123])\.(\d+)\.", lambda m: f"stages.{m[1]}.blocks.{int(m[2]) - 1}."),
            (r"\.token_mixer\.0\.layer_scale$", ".ls1.gamma"),
            (r"\.channel_mixer\.layer_scale$", ".ls2.gamma"),
            (r"\.token_mixer\.0\.main\.", ".mixer."),
            (r"\.token_mixer\.1\.", ".cpe2.se."),
            (r"\.channel_mixer\.main\.", ".mlp."),
            (r"\.fc\.c\.", ".fc.linear."),
            (r"\.(conv[12]?|downsample\.0)\.conv\.(c|bn)\.", r".\1.large.\2."),
            (r"\.(conv[12]?|downsample\.0)\.conv1\.(c|bn)\.", r".\1.small.\2."),
            (r"\.c\.", ".conv."),
            (r"\.bn\.", ".norm."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (80, 160, 320, 640),
        stem_dim: int = 64,
        mixer_kernels: Sequence[tuple[int, int]] = ((3, 3), (3, 3), (7, 7), (7, 7)),
        mlp_kernels: Sequence[int] = (7, 7, 7, 7),
        mlp_ratios: Sequence[float] = (3.0, 3.0, 3.0, 3.0),
        act_layers: Sequence[type[nn.Module]] = (nn.GELU, nn.GELU, nn.GELU, nn.GELU),
        squeeze_excite: Sequence[bool] = (False, False, False, False),
        layer_scale: float | None = None,
        layer_norm_last: bool = False,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        own = [
            [{"type": "large_kernel_ffn", "kernel_sizes": kernels, "act_layer": act}]
            for kernels, act in zip(mixer_kernels, act_layers, strict=False)
        ]
        blocks = []
        for kernel, ratio, act, excite in zip(mlp_kernels, mlp_ratios, act_layers, squeeze_excite, strict=False):
            block = partial(
                Block,
                mlp_ratio=ratio,
                norm_layer=nn.Identity,  # mixer and MLP have their own
                act_layer=act,
                mlp_layer=partial(ConvFirstMlp, kernel_size=kernel),
                layer_scale=layer_scale,
            )
            excited = partial(block, cpe_kernels=(None, 1), cpe_layer=_SqueezeExciteAfterMixer)
            blocks.append([excited if excite else block, block])
        super().__init__(
            stem=conv_stem(in_chans, (stem_dim, embed_dims[0]), 3, (2, 2), nn.GELU, last_act=False),
            stages=build_stages(
                embed_dims,
                depths,
                [None] * len(depths),
                resolve_mixers(own[: len(depths)], mixers),
                downsample=lambda in_dim, dim: nn.Sequential(
                    BranchedDepthwiseConv(in_dim, dim, 7, 2), ResidualConvNorm(dim)
                ),
                block=blocks,
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            norm=LayerNorm(embed_dims[-1], eps=1e-6) if layer_norm_last else nn.BatchNorm2d(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )


def _no_weights(name: str) -> str:
    return f"timm has none; the authors' are at https://github.com/ysj9909/FFNet/releases/download/v1.0/{name}.pth.tar"


_README = "README.md of ysj9909/FFNet"
_WIDE = {"embed_dims": (96, 192, 384, 768), "layer_scale": 1e-6}

VARIANTS = {
    "zoo_ffnet_1": Variant(
        {"mlp_kernels": (3, 3, 3, 3)},
        Published(13.7, 2.9, 81.3, 256, _README, ("gmacs",)),
        no_weights=_no_weights("ffnet_1"),
    ),
    "zoo_ffnet_2": Variant(
        {"depths": (3, 3, 15, 3), "embed_dims": (88, 176, 352, 704)},
        Published(26.9, 6.0, 82.9, 256, _README),
        no_weights=_no_weights("ffnet_2"),
    ),
    "zoo_ffnet_3": Variant(
        {"depths": (4, 4, 22, 5), **_WIDE},
        Published(48.3, 10.1, 83.9, 256, _README),
        {"crop_pct": 0.95},
        no_weights=_no_weights("ffnet_3"),
    ),
    "zoo_ffnet_4": Variant(
        {"depths": (4, 4, 27, 3), **_WIDE, "embed_dims": (128, 256, 512, 1024)},
        Published(79.2, 43.1, 85.3, 384, _README),
        {"crop_pct": 0.95},
        no_weights=_no_weights("ffnet_4_384"),
    ),
}

TINY = {"zoo_ffnet_1": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)}}

register_family(
    __name__,
    FFNet,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    input_size=(3, 256, 256),
    pool_size=(8, 8),
    crop_pct=0.9,
    paper_ids="arXiv:2406.02021",
    origin_url="https://github.com/ysj9909/FFNet",
    license="apache-2.0",
)
