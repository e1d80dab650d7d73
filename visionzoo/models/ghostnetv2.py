"""GhostNetV2: Enhance Cheap Operation with Long-Range Attention, NeurIPS 2022, https://arxiv.org/abs/2211.12905.

Facts from ghostnetv2_pytorch of https://github.com/huawei-noah/Efficient-AI-Backbones at f90e129 (no license in that
folder, so only facts are taken; timm states Apache-2.0 for the weights); the code here is our own. Where we differ:
maps are halved for attention also where they have one row or column; the 1×1 convolution after the last stage is the
head's.
`mixers` replace the two convolutions that mix attention's tokens; with "none" a block is that of the first GhostNet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, HardSigmoid, SqueezeExcite, make_divisible
from torch import Tensor, nn

from visionzoo.kernels.regions import is_symbolic
from visionzoo.layers.conv_norm import ConvNorm, DepthwiseConvNorm
from visionzoo.layers.heads import HiddenLayerHead
from visionzoo.layers.mixers import build_mixer, resolve_mixers
from visionzoo.layers.nhwc import on_nchw
from visionzoo.layers.stem import conv_stem
from visionzoo.layers.tracing import one_node
from visionzoo.models._contract import drop_path_rates
from visionzoo.models._pyramid import Pyramid, Stage
from visionzoo.models._registry import Published, Variant, register_family

# for each block: side of the kernels, channels in the middle, channels out, whether there is squeeze-and-excitation
LAYOUT = (
    ((3, 16, 16, False),),
    ((3, 48, 24, False), (3, 72, 24, False)),
    ((5, 72, 40, True), (5, 120, 40, True)),
    (
        (3, 240, 80, False),
        (3, 200, 80, False),
        (3, 184, 80, False),
        (3, 184, 80, False),
        (3, 480, 112, True),
        (3, 672, 112, True),
    ),
    ((5, 672, 160, True), (5, 960, 160, False), (5, 960, 160, True), (5, 960, 160, False), (5, 960, 160, True)),
)
_conv_norm = partial(ConvNorm, bias=False, norm_layer=nn.BatchNorm2d)


class GhostModule(nn.Module):
    """Half of the channels from a 1×1 convolution, the others from those by a depthwise one; on [B, H, W, C].

    Args:
        in_dim: channels in.
        out_dim: channels out.
        act: have ReLU after both.
    """

    def __init__(self, in_dim: int, out_dim: int, *, act: bool):
        super().__init__()
        self.out_dim = out_dim
        self.primary = _conv_norm(in_dim, -(-out_dim // 2), 1)
        self.cheap = DepthwiseConvNorm(-(-out_dim // 2), 3)
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H, W, out_dim]."""
        primary = self.act(self.primary(x))
        return torch.cat([primary, self.act(self.cheap(primary))], -1)[..., : self.out_dim].contiguous()


class GhostBottleneck(nn.Module):
    """Residual block of two ghost modules on [B, H, W, C]; the first is scaled by attention on the halved map.

    `branch_gate` and `peg` are places for a gate before the sum and for a position generator after it.

    Args:
        in_dim: channels in.
        mid_dim: channels between the modules.
        out_dim: channels out.
        kernel_size: side of the kernels of strided convolutions, odd.
        stride: step of the block, 1 or 2; the map shrinks by it, rounded up.
        squeeze: have squeeze-and-excitation between the modules.
        mixer: of attention's tokens, on `mid_dim` channels; None for a block without attention.
        drop_path: probability in [0, 1) with which a sample skips the block in training.
    """

    def __init__(
        self,
        in_dim: int,
        mid_dim: int,
        out_dim: int,
        *,
        kernel_size: int,
        stride: int,
        squeeze: bool,
        mixer: nn.Module | None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.dim = out_dim

        def depthwise(dim: int) -> nn.Module:
            return _conv_norm(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim)

        self.ghost1 = GhostModule(in_dim, mid_dim, act=True)
        self.short = _conv_norm(in_dim, mid_dim, 1) if mixer is not None else None
        self.mixer = mixer
        self.shrink = depthwise(mid_dim) if stride > 1 else nn.Identity()
        rd_channels = make_divisible(mid_dim / 4, 4)
        self.squeeze = SqueezeExcite(mid_dim, rd_channels=rd_channels, gate_layer=HardSigmoid) if squeeze else None
        self.ghost2 = GhostModule(mid_dim, out_dim, act=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_dim != out_dim:
            self.shortcut = nn.Sequential(depthwise(in_dim), _conv_norm(in_dim, out_dim, 1))
        self.branch_gate: nn.Module = nn.Identity()
        self.peg: nn.Module = nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H', W', out_dim]."""
        branch = self.ghost1(x)
        if self.mixer is not None and self.short is not None:
            branch = _scale(branch, self.mixer(self.short(_halve(x))))
        branch = self.shrink(branch)
        if self.squeeze is not None:
            branch = on_nchw(self.squeeze, branch)
        return self.peg(self.shortcut(x) + self.drop_path(self.branch_gate(self.ghost2(branch))))


@one_node  # it looks at the size of the map
def _halve(x: Tensor) -> Tensor:
    """Average pooling of [B, H, W, C] to [B, ⌊H/2⌋, ⌊W/2⌋, C], to one row or column at least."""
    kernel = (2, 2) if is_symbolic(x) else (min(2, x.shape[1]), min(2, x.shape[2]))
    return F.avg_pool2d(x.permute(0, 3, 1, 2), kernel, kernel).permute(0, 2, 3, 1)


@one_node  # it looks at the size of the map
def _scale(x: Tensor, attention: Tensor) -> Tensor:
    """Multiply [B, H, W, C] by the sigmoid of a smaller map, whose values repeat."""
    grown = F.interpolate(attention.sigmoid().permute(0, 3, 1, 2), size=tuple(x.shape[1:3]), mode="nearest")
    return x * grown.permute(0, 2, 3, 1)


class GhostNetV2(Pyramid):
    """GhostNetV2.

    Features are the ends of the five stages, the authors' blocks 0, 2, 4, 6 and 8, at 1/2 to 1/32 of the image. timm's
    `features_only` takes its stem's convolution before the norm and the first block of each later stage instead.

    Args:
        width: what all numbers of channels are multiplied by.
        layout: for each stage and block the side of the kernels, the channels in the middle and out, and whether
            there is squeeze-and-excitation. The first block of each stage but the first halves the map.
        plain: how many blocks come first without attention.
        head_dim: channels of the head's hidden layer.
        mixers: other token mixers in attention for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if `mixers` names a stage without attention.
    """

    FEATURES = 5
    POOLS = ("", "avg", "max", "avgmax")

    CHECKPOINT_KEYS = {
        "authors": [  # and timm's
            (r"^conv_stem\.", "stem.0.conv."),
            (r"^bn1\.", "stem.0.norm."),
            (r"^blocks\.9\.0\.conv\.", "head.conv.conv."),
            (r"^blocks\.9\.0\.bn1\.", "head.conv.norm."),
            (r"^blocks\.0\.", "stages.0.blocks."),
            (r"^blocks\.([1357])\.0\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.blocks.0."),
            (r"^blocks\.([2468])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{int(m[2]) + 1}."),
            (r"\.primary_conv\.0\.", ".primary.conv."),
            (r"\.primary_conv\.1\.", ".primary.norm."),
            (r"\.cheap_operation\.0\.", ".cheap.conv."),
            (r"\.cheap_operation\.1\.", ".cheap.norm."),
            (r"\.ghost1\.short_conv\.0\.", ".short.conv."),
            (r"\.ghost1\.short_conv\.1\.", ".short.norm."),
            (r"\.ghost1\.short_conv\.([2-5])\.", lambda m: f".mixer.layers.{int(m[1]) - 2}."),
            (r"\.conv_dw\.", ".shrink.conv."),
            (r"\.bn_dw\.", ".shrink.norm."),
            (r"\.se\.conv_reduce\.", ".squeeze.fc1."),
            (r"\.se\.conv_expand\.", ".squeeze.fc2."),
            (r"\.shortcut\.([0-3])\.", lambda m: f".shortcut.{int(m[1]) // 2}.{('conv', 'norm')[int(m[1]) % 2]}."),
            (r"^conv_head\.", "head.hidden."),
            (r"^classifier\.", "head.fc."),
        ],
    }

    def __init__(
        self,
        *,
        width: float = 1.0,
        layout: Sequence[Sequence[tuple[int, int, int, bool]]] = LAYOUT,
        plain: int = 2,
        head_dim: int = 1280,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        for i, stage in enumerate(layout):
            for kernel_size, mid, out, _ in stage:
                if kernel_size < 1 or kernel_size % 2 == 0 or mid < 1 or out < 1:
                    raise ValueError(
                        f"GhostNetV2: a block is an odd side of kernels, channels between the modules and out, and "
                        f"whether it has squeeze-and-excitation; got layout[{i}]={stage!r}"
                    )
        if not layout or not all(layout):
            raise ValueError(f"GhostNetV2: layout must have a block in every stage, got {layout=}")
        depths = [len(blocks) for blocks in layout]
        first = [sum(depths[:i]) for i in range(len(depths))]  # each stage's first block's number
        attends = [start + depth > plain for start, depth in zip(first, depths, strict=True)]
        specs = resolve_mixers([[{"type": "decoupled_fc"}] if some else [] for some in attends], mixers)
        for i, some in enumerate(attends):
            if specs[i] and not some and not isinstance(mixers, str | Mapping):
                raise ValueError(
                    f"GhostNetV2: mixers stand in attention, and the blocks of stage {i} have none; expected None "
                    f"there, got {mixers=}"
                )
        rates = drop_path_rates(drop_path_rate, depths)
        stem_dim = in_dim = make_divisible(16 * width, 4)
        stages, embed_dims = [], []
        for i, stage in enumerate(layout):
            blocks, turns = [], cycle(specs[i] or [{"type": "none"}])
            for j, (kernel_size, mid, out, squeeze) in enumerate(stage):
                mid_dim, out_dim = make_divisible(mid * width, 4), make_divisible(out * width, 4)
                block = GhostBottleneck(
                    in_dim,
                    mid_dim,
                    out_dim,
                    kernel_size=kernel_size,
                    stride=2 if i and j == 0 else 1,
                    squeeze=squeeze,
                    mixer=build_mixer(next(turns), mid_dim) if first[i] + j >= plain else None,
                    drop_path=rates[i][j],
                )
                blocks.append(block)
                in_dim = out_dim
            stages.append(Stage(nn.Identity(), blocks))
            embed_dims.append(in_dim)
        super().__init__(
            stem=conv_stem(in_chans, [stem_dim], 3, (2,), nn.ReLU),
            stages=stages,
            embed_dims=embed_dims,
            reduction=2,
            head_layer=partial(HiddenLayerHead, conv_features=mid_dim, hidden_features=head_dim),
            in_chans=in_chans,
            **head,
        )


def _weights(width: int) -> dict[str, Any]:
    return {"tag": "in1k", "hf_hub_id": f"timm/ghostnetv2_{width}.in1k"}


_PAPER = "paper, not checked against its text; README.md of the repository: 167 M multiply-adds and 75.3"

VARIANTS = {
    "zoo_ghostnetv2_100": Variant({}, Published(6.1, 0.167, 75.3, source=_PAPER), _weights(100)),
    "zoo_ghostnetv2_130": Variant({"width": 1.3}, Published(8.9, 0.269, 76.9, source=_PAPER), _weights(130)),
    "zoo_ghostnetv2_160": Variant({"width": 1.6}, Published(12.3, 0.399, 77.8, source=_PAPER), _weights(160)),
}

TINY = {
    "zoo_ghostnetv2_100": {
        "layout": (
            ((3, 8, 8, False),),
            ((3, 16, 8, False), (3, 16, 8, False)),
            ((5, 16, 16, True),),
            ((3, 32, 16, False),),
            ((5, 32, 24, True), (5, 32, 24, False)),
        ),
        "head_dim": 32,
    }
}

register_family(
    __name__,
    GhostNetV2,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    paper_ids="arXiv:2211.12905",
    origin_url="https://github.com/huawei-noah/Efficient-AI-Backbones",
    license="apache-2.0",
)
