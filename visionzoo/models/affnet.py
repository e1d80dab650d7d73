"""AFFNet: Adaptive Frequency Filters As Efficient Global Token Mixers, ICCV 2023, https://arxiv.org/abs/2307.14008.

Facts from "Adaptive Frequency Filters" of https://github.com/microsoft/TokenMixers at 99dbe38 (MIT), a copy of CVNets;
the code here is our own. The settings of the published models are not in the repository. The defaults here are those of
CVNets' MobileViT: swish, and a norm over channels and map. `norm_layer="layer_norm"` is the norm that the authors'
command line has by default, and `act_layer="relu"` its activation. Images have 256 px, not normalized.

Where we differ: transforms of float64 are in float64, where the authors' code rounds. Their form with dilated
convolutions, for segmentation, is not here. Multiply-adds are counted without those of the Fourier transforms. AFFNet-T
has 2.7 M parameters (2,654,232), in the authors' own code too; published are 2.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from visionzoo.layers.conv_norm import ConvNorm, InvertedResidual
from visionzoo.layers.heads import ProjectionHead
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.nhwc import GroupNorm1, on_nchw
from visionzoo.layers.norm import DeviationNorm
from visionzoo.layers.stem import conv_stem
from visionzoo.models._pyramid import Pyramid, Stage, build_stages
from visionzoo.models._registry import Published, Variant, register_family

_conv_norm = partial(ConvNorm, bias=False, norm_layer=nn.BatchNorm2d)
NORMS: dict[str, type[nn.Module]] = {
    "layer_norm_2d": GroupNorm1,
    "layer_norm": DeviationNorm,
    "batch_norm": nn.BatchNorm2d,
}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "swish": nn.SiLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "hard_swish": nn.Hardswish,
}


class FrequencyBlock(nn.Module):
    """Inverted residual, then token mixer, each after a norm, with one residual around both; on [B, H, W, C].

    `branch_gate` and `peg` are places for a gate before the sum and for a position generator after it.

    Args:
        dim: channels C.
        mixer: token mixer; None leaves only the inverted residual.
        mlp_ratio: channels inside the inverted residual over those that it gets.
        norm_layer: norm of [B, H, W, C], or a batch norm of [B, C, H, W].
        act_layer: activation of the inverted residual.
        in_dim: channels in, where they are not C: then there is no residual. None for C.
        double_skip: have a residual around the first half, too.
        drop_path: probability in [0, 1) with which a sample skips the last branch in training.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module | None,
        *,
        mlp_ratio: float,
        norm_layer: type[nn.Module],
        act_layer: type[nn.Module],
        in_dim: int | None = None,
        double_skip: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        in_dim = dim if in_dim is None else in_dim
        self.dim = dim
        self.mlp = InvertedResidual(in_dim, dim, ratio=mlp_ratio, act_layer=act_layer)
        self.mixer = mixer
        if mixer is not None:
            self.norm1, self.norm2 = norm_layer(in_dim), norm_layer(dim)
        self.residual = in_dim == dim
        self.double_skip = double_skip
        self.branch_gate: nn.Module = nn.Identity()
        self.peg: nn.Module = nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, H, W, C]."""
        if self.mixer is None:
            branch = self.mlp(x)
        else:
            branch = _normalize(self.norm1, x)
            branch = branch + self.mlp(branch) if self.residual else self.mlp(branch)
            if self.double_skip and self.residual:
                x = branch = x + branch
            branch = self.mixer(_normalize(self.norm2, branch))
        branch = self.drop_path(self.branch_gate(branch))
        return self.peg(x + branch if self.residual else branch)


class FusionStage(Stage):
    """A stage whose blocks' output is normalized, projected, and fused with their input by a 1×1 convolution.

    Args:
        downsample: of a map [B, H, W, C_in] to [B, H', W', dim].
        blocks: of [B, H, W, dim].
        dim: channels.
        norm: after the blocks.
        act_layer: activation after the fusion.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        dim: int,
        *,
        norm: nn.Module,
        act_layer: type[nn.Module],
    ):
        super().__init__(downsample, blocks, norm)
        self.proj = _conv_norm(dim, dim, 1)
        self.fusion = _conv_norm(2 * dim, dim, 1)
        self.act = act_layer()

    def forward_map(self, x: Tensor) -> Tensor:
        """[B, H, W, C_in] to [B, H', W', dim]."""
        x = self.downsample(x)
        out = self.proj(_normalize(self.norm, self.forward_blocks(x)))
        return self.act(self.fusion(torch.cat([x, out], -1)))


def _normalize(norm: nn.Module, x: Tensor) -> Tensor:
    return on_nchw(norm, x) if isinstance(norm, nn.BatchNorm2d) else norm(x)


class AFFNet(Pyramid):
    """AFFNet.

    Args:
        depths: blocks of each stage, after the inverted residual that halves the map.
        embed_dims: channels of each stage.
        stem_dim: channels of the stem.
        expand_ratio: channels inside the inverted residuals that halve the map or are in stages without filters, over
            those that they get.
        mlp_ratio: the same of the others.
        plain_stages: how many stages come first without filters.
        norm_layer: norm in the blocks, a name of `NORMS`.
        act_layer: activation everywhere, a name of `ACTIVATIONS`.
        double_skip: have a residual around the first half of each block, too.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if a norm or activation is unknown.
    """

    FEATURES = 5
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^conv_1\.block\.", "stem.0."),
            (r"^layer_1\.(\d+)\.block\.", r"stages.0.blocks.\1.mlp."),
            (r"^layer_(\d)\.0\.block\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
            (r"^layer_2\.(\d+)\.block\.", lambda m: f"stages.1.blocks.{int(m[1]) - 1}.mlp."),
            (r"^layer_(\d)\.1\.global_rep\.\d+\.(\w+)$", lambda m: f"stages.{int(m[1]) - 1}.norm.{m[2]}"),
            (r"^layer_(\d)\.1\.global_rep\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
            (r"^layer_(\d)\.1\.conv_proj\.block\.", lambda m: f"stages.{int(m[1]) - 1}.proj."),
            (r"^layer_(\d)\.1\.fusion\.block\.", lambda m: f"stages.{int(m[1]) - 1}.fusion."),
            (r"\.mlp\.block\.", ".mlp."),
            (r"\.exp_1x1\.block\.", ".expand."),
            (r"\.conv_3x3\.block\.", ".depthwise."),
            (r"\.red_1x1\.block\.", ".reduce."),
            (r"\.filter\.", ".mixer."),
            (r"^conv_1x1_exp\.block\.", "head.proj."),
            (r"^classifier\.fc\.", "head.fc."),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 2, 2, 4, 3),
        embed_dims: Sequence[int] = (32, 64, 128, 256, 320),
        stem_dim: int = 16,
        expand_ratio: float = 4.0,
        mlp_ratio: float = 2.0,
        plain_stages: int = 2,
        norm_layer: str = "layer_norm_2d",
        act_layer: str = "swish",
        double_skip: bool = False,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        for name, given, known in (("norm_layer", norm_layer, NORMS), ("act_layer", act_layer, ACTIVATIONS)):
            if given not in known:
                raise ValueError(f"AFFNet: unknown {name}={given!r}, expected one of {', '.join(known)}")
        if not min(depths):
            raise ValueError(f"AFFNet: every stage must have a block, got depths={tuple(depths)}")
        norm, act = NORMS[norm_layer], ACTIVATIONS[act_layer]
        plain = [i < plain_stages for i in range(len(depths))]
        block = partial(FrequencyBlock, norm_layer=norm, act_layer=act, double_skip=double_skip)
        blocks = [
            [partial(block, mlp_ratio=expand_ratio if p else mlp_ratio)] * depth
            for p, depth in zip(plain, depths, strict=True)
        ]
        blocks[0][0] = partial(blocks[0][0], in_dim=stem_dim)
        own = [[{"type": "none"} if p else {"type": "adaptive_fourier", "act_layer": act}] for p in plain]
        stages = build_stages(
            embed_dims,
            depths,
            [None] * len(depths),
            resolve_mixers(own, mixers),
            downsample=partial(InvertedResidual, ratio=expand_ratio, act_layer=act, stride=2),
            block=blocks,
            drop_path_rate=drop_path_rate,
        )
        for i, dim in enumerate(embed_dims):
            if not plain[i]:
                stages[i] = FusionStage(
                    stages[i].downsample, list(stages[i].blocks), dim, norm=norm(dim), act_layer=act
                )
        super().__init__(
            stem=conv_stem(in_chans, [stem_dim], 3, (2,), act),
            stages=stages,
            embed_dims=embed_dims,
            reduction=2,
            head_layer=partial(ProjectionHead, hidden_features=min(4 * embed_dims[-1], 960), act_layer=act, bias=False),
            in_chans=in_chans,
            **head,
        )

    def init_weights(self) -> None:
        """Leave torch's initial values to all but the classifier, as released."""
        if isinstance(self.head.fc, nn.Linear):
            nn.init.xavier_uniform_(self.head.fc.weight)
            nn.init.zeros_(self.head.fc.bias)


_README = "README.md of Adaptive Frequency Filters in microsoft/TokenMixers"
_LINK = "the authors' are linked in their README, as files that cannot be fetched by address"

VARIANTS = {
    "zoo_affnet_et": Variant(
        {"embed_dims": (32, 48, 64, 104, 144), "expand_ratio": 2.0},
        Published(1.4, 0.4, 73.0, size=256, source=_README),
        no_weights=_LINK,
    ),
    "zoo_affnet_t": Variant(
        {"embed_dims": (32, 48, 96, 160, 192)},
        Published(2.6, 0.8, 77.0, size=256, source=_README, explained=("params_m",)),
        no_weights=_LINK,
    ),
    "zoo_affnet": Variant({}, Published(5.5, 1.5, 79.8, size=256, source=_README), no_weights=_LINK),
}

_SMALL = {"embed_dims": (8, 8, 16, 16, 24), "depths": (1, 1, 1, 1, 1), "stem_dim": 8, "expand_ratio": 2.0}
TINY = {
    "zoo_affnet_et": _SMALL,
    "zoo_affnet_t": {**_SMALL, "norm_layer": "layer_norm", "act_layer": "relu"},
}

register_family(
    __name__,
    AFFNet,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    input_size=(3, 256, 256),
    pool_size=(8, 8),
    crop_pct=256 / 288,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    paper_ids="arXiv:2307.14008",
    origin_url="https://github.com/microsoft/TokenMixers",
    license="mit",
)
