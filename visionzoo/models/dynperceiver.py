"""Dynamic Perceiver for Efficient Visual Recognition, ICCV 2023, https://arxiv.org/abs/2306.11248.

Facts from https://github.com/LeapLabTHU/Dynamic_Perceiver at 0d2a629 (MIT); the code here is our own. A network of
convolutions (ResNet, RegNetY or MobileNetV3) and latents that look at its maps and are written back onto them;
classifiers may answer before the later stages run: `early` after the second stage, `latent` after the third, `cnn`
after the fourth, and the model's own answer sees map and latents.

The authors register each network with several numbers of latents; here that is the argument `num_latents`, and the
variants have the 128 of their published weights. Their training loss is the default of `AUXILIARY` (README.md of the
repository): classifiers weigh 0.5, 0.5, 1 and 1, and half of what each earlier one differs from the last, by the
Kullback-Leibler divergence at temperature 1, is added as the term `distillation`.
Where we differ: latents look at maps of any size, pooled to 7×7 cells as theirs are; `input_size` of the authors, which
matters only without that pooling, is left out, as are their switches for ablations. Initial values are the zoo's.
Features are the maps at the ends of the stages, before latents are written onto them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

from timm.layers import HardSigmoid, SEModule, make_divisible
from torch import nn

from visionzoo.layers.bottleneck import BasicBlock, Bottleneck
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import build_mixer, resolve_mixers
from visionzoo.layers.stem import Stem, conv_stem
from visionzoo.models._contract import drop_path_rates
from visionzoo.models._perceiver import STAGES, DynPerceiver
from visionzoo.models._registry import Published, Variant, register_family

_LATENT_KEYS: list[tuple[str, Any]] = [
    (r"^latent$", "latents.latent"),
    (r"^(dwc|cross_att)1_x2z", r"latents.read.\1"),
    (r"^self_att1\.", "latents.read.blocks."),
    (r"^(dwc|cross_att)([2-4])_x2z", lambda m: f"stages.{int(m[2]) - 2}.exchange.read.{m[1]}"),
    (r"^cross_att([2-4])_z2x", lambda m: f"stages.{int(m[1]) - 2}.exchange.write"),
    (r"^self_att([2-4])\.", lambda m: f"stages.{int(m[1]) - 2}.exchange.read.blocks."),
    (r"^last_cross_att_z2x\.", "head.write."),
    (r"^token_mixer\.(\d)\.0\.", r"stages.\1.exchange.merge_norm."),
    (r"^token_mixer\.(\d)\.1\.", r"stages.\1.exchange.merge."),
    (r"^token_expander\.(\d)\.0\.", r"stages.\1.exchange.widen_norm."),
    (r"^token_expander\.(\d)\.1\.", r"stages.\1.exchange.widen."),
    (r"\.read\.cross_att\.", ".read.cross."),
    (r"\.cross_attn\.q_norm\.", ".norm1."),
    (r"\.cross_attn\.kv_norm\.", ".norm_context."),
    (r"\.cross_attn\.attention\.relative_position_bias$", ".positions"),
    (r"\.cross_attn\.attention\.q_proj\.", ".q."),
    (r"\.cross_attn\.attention\.k_proj\.(.*)$", r".kv.\1#0"),
    (r"\.cross_attn\.attention\.v_proj\.(.*)$", r".kv.\1#1"),
    (r"\.cross_attn\.attention\.o_proj\.", ".proj."),
    (r"\.self_attn\.norm\.", ".norm1."),
    (r"\.self_attn\.attention\.q_proj\.(.*)$", r".mixer.qkv.\1#0"),
    (r"\.self_attn\.attention\.k_proj\.(.*)$", r".mixer.qkv.\1#1"),
    (r"\.self_attn\.attention\.v_proj\.(.*)$", r".mixer.qkv.\1#2"),
    (r"\.self_attn\.attention\.o_proj\.", ".mixer.proj."),
    (r"\.mlp\.layernorm\.", ".norm2."),
    (r"^early_classifier3\.", "head.early."),
    (r"^classifier_att\.", "head.latent."),
    (r"^isc3\.0\.", "head.early_shortcut.fc."),
    (r"^isc3\.1\.", "head.early_shortcut.norm."),
    (r"^isc4\.0\.", "head.latent_shortcut.fc."),
    (r"^isc4\.1\.", "head.latent_shortcut.norm."),
    (r"^classifier_merge\.0\.", "head.merged.norm."),
    (r"^cnn_stem\.0\.weight$", "stem.0.conv.weight"),
    (r"^cnn_stem\.1\.(weight|bias|running_mean|running_var|num_batches_tracked)$", r"stem.0.norm.\1"),
]
_CLASSIFIER_KEYS: list[tuple[str, Any]] = [
    (r"^classifier_cnn\.(weight|bias)$", r"head.cnn.fc.\1"),
    (r"^classifier_merge\.1\.", "head.merged.fc."),
]


def _mixers(stages: int, mixers: Any) -> list[Callable[[int], Any]]:
    """Return for each stage what makes the mixer of a block in place of its convolution, if any, given its channels."""

    def make(turn: Iterator[Any], dim: int) -> Any:
        return build_mixer(next(turn), dim)

    return [partial(make, cycle(specs or [{"type": "none"}])) for specs in resolve_mixers([[]] * stages, mixers)]


def _bottlenecks(
    name: str,
    in_dims: Sequence[int],
    out_dims: Sequence[int],
    mid_dims: Sequence[int],
    depths: Sequence[int],
    strides: Sequence[int],
    mixers: Any,
    drop_path_rate: float,
    *,
    group_size: int | None = None,
    squeeze_ratio: float = 0.0,
    basic: bool = False,
) -> list[list[nn.Module]]:
    """Build the blocks of four stages, each of which begins with a strided one; basic ones have no channels between."""
    for key, value in (("depths", depths), ("embed_dims", out_dims)):
        if len(value) != STAGES or min(value) < 1:
            raise ValueError(f"{name}: {key} must be 1 or more for each of {STAGES} stages, got {tuple(value)}")
    rates, make = drop_path_rates(drop_path_rate, depths), _mixers(STAGES, mixers)
    stages: list[list[nn.Module]] = []
    for i, (in_dim, dim, mid_dim) in enumerate(zip(in_dims, out_dims, mid_dims, strict=True)):
        blocks: list[nn.Module] = []
        for j in range(depths[i]):
            block_dim = in_dim if j == 0 else dim
            stride = 1 if j else strides[i]
            if basic:
                block = BasicBlock(block_dim, dim, mixer=make[i](dim), stride=stride, drop_path=rates[i][j])
                blocks.append(block)
                continue
            blocks.append(
                Bottleneck(
                    block_dim,
                    dim,
                    mid_dim,
                    mixer=make[i](mid_dim),
                    stride=stride,
                    groups=mid_dim // group_size if group_size else 1,
                    gate=partial(SEModule, rd_channels=round(block_dim * squeeze_ratio)) if squeeze_ratio else None,
                    drop_path=rates[i][j],
                )
            )
        stages.append(blocks)
    return stages


class DynPerceiverResNet(DynPerceiver):
    """Dynamic Perceiver on ResNet-50, or on ResNet-18 and ResNet-34.

    Args:
        depths: blocks of each stage.
        basic: have blocks of two 3×3 convolutions, as in ResNet-18 and ResNet-34, not bottlenecks.
        width: what all numbers of channels are multiplied by.
        num_latents: latents before the first stage; each further one has half of them.
        latent_depths: blocks of self-attention of the latents, for each stage.
        num_heads: heads of self-attention, for each stage.
        latent_mlp_ratio: hidden width of their MLPs over channels.
        mixers: token mixers in place of the 3×3 convolutions of some stages (of basic blocks the second one), see
            `visionzoo.layers.mixers.resolve_mixers`; average pooling follows where the bottleneck has a stride.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: see `DynPerceiver`.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            *_LATENT_KEYS,
            *_CLASSIFIER_KEYS,
            (r"^cnn_body_stage(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
            (r"\.conv(\d)\.weight$", r".conv\1.conv.weight"),
            (r"\.bn(\d)\.", r".conv\1.norm."),
            (r"\.downsample\.0\.", ".shortcut.conv."),
            (r"\.downsample\.1\.", ".shortcut.norm."),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        basic: bool = False,
        width: float = 1.0,
        num_latents: int = 128,
        latent_depths: Sequence[int] = (3, 3, 9, 3),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        latent_mlp_ratio: float = 4.0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        mid_dims = [int(width * 64 * 2**i) for i in range(STAGES)]
        out_dims = [dim if basic else 4 * dim for dim in mid_dims]
        in_dims = [mid_dims[0], *out_dims[:-1]]
        super().__init__(
            stem=conv_stem(in_chans, mid_dims[:1], 7, (2,), nn.ReLU, pool=True),
            stages=_bottlenecks(
                type(self).__name__,
                in_dims,
                out_dims,
                mid_dims,
                depths,
                (1, 2, 2, 2),
                mixers,
                drop_path_rate,
                basic=basic,
            ),
            in_dims=in_dims,
            out_dims=out_dims,
            reductions=(4, 8, 16, 32),
            num_latents=num_latents,
            latent_depths=latent_depths,
            num_heads=num_heads,
            latent_mlp_ratio=latent_mlp_ratio,
            in_chans=in_chans,
            **head,
        )


class DynPerceiverRegNet(DynPerceiver):
    """Dynamic Perceiver on RegNetY.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        group_size: channels a group of the 3×3 convolutions.
        num_latents: latents before the first stage; each further one has half of them.
        latent_depths: blocks of self-attention of the latents, for each stage.
        num_heads: heads of self-attention, for each stage.
        latent_mlp_ratio: hidden width of their MLPs over channels.
        mixers: token mixers in place of the 3×3 convolutions of some stages, as in `DynPerceiverResNet`; the
            squeeze-and-excitation of these blocks is left out.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: see `DynPerceiver`; or if `group_size` does not divide the channels.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            *_LATENT_KEYS,
            *_CLASSIFIER_KEYS,
            (r"^cnn_body\.block(\d)\.block\d-(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
            (r"\.proj\.0\.weight$", ".shortcut.conv.weight"),
            (r"\.proj\.1\.", ".shortcut.norm."),
            (r"\.f\.se\.", ".gate."),
            (r"\.f\.([abc])\.([01])\.", lambda m: f".conv{'abc'.index(m[1]) + 1}.{('conv', 'norm')[int(m[2])]}."),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 3, 6, 6),
        embed_dims: Sequence[int] = (48, 104, 208, 440),
        group_size: int = 8,
        num_latents: int = 128,
        latent_depths: Sequence[int] = (3, 3, 9, 6),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        latent_mlp_ratio: float = 4.0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        name = type(self).__name__
        if group_size < 1 or any(dim % group_size for dim in embed_dims):
            raise ValueError(f"{name}: group_size must divide embed_dims={tuple(embed_dims)}, got {group_size=}")
        in_dims = [32, *embed_dims[:-1]]
        super().__init__(
            stem=conv_stem(in_chans, (32,), 3, (2,), nn.ReLU),
            stages=_bottlenecks(
                name,
                in_dims,
                embed_dims,
                embed_dims,
                depths,
                (2, 2, 2, 2),
                mixers,
                drop_path_rate,
                group_size=group_size,
                squeeze_ratio=0.25,
            ),
            in_dims=in_dims,
            out_dims=embed_dims,
            reductions=(4, 8, 16, 32),
            num_latents=num_latents,
            latent_depths=latent_depths,
            num_heads=num_heads,
            latent_mlp_ratio=latent_mlp_ratio,
            in_chans=in_chans,
            **head,
        )


# Blocks of the stem and of each stage: side of the kernels, channels in the middle and out, whether there is
# squeeze-and-excitation, whether activations are Hardswish (else ReLU), and the stride.
Row = tuple[int, int, int, bool, bool, int]
LAYOUT: tuple[tuple[Row, ...], ...] = (
    ((3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2)),
    ((3, 72, 24, False, False, 1), (5, 72, 40, True, False, 2)),
    ((5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1), (3, 240, 80, False, True, 2)),
    (
        (3, 200, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 480, 112, True, True, 1),
        (3, 672, 112, True, True, 1),
        (5, 672, 160, True, True, 2),
    ),
    ((5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1)),
)
_divisible = partial(make_divisible, divisor=8)
_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class DynPerceiverMobileNet(DynPerceiver):
    """Dynamic Perceiver on MobileNetV3 (large).

    Args:
        width: what all numbers of channels are multiplied by, brought to multiples of 8.
        layout: for the stem and each of four stages the blocks: side of the kernels, channels in the middle and out,
            whether there is squeeze-and-excitation, whether activations are Hardswish, and the stride.
        num_latents: latents before the first stage; each further one has half of them.
        latent_depths: blocks of self-attention of the latents, for each stage.
        num_heads: heads of self-attention, for each stage.
        latent_mlp_ratio: hidden width of their MLPs over channels.
        mixers: token mixers in place of the depthwise convolutions of some stages, as in `DynPerceiverRegNet`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: see `DynPerceiver`; or if `layout` has other entries.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^cnn_stem\.0\.0\.", "stem.0.conv."),
            (r"^cnn_stem\.0\.1\.", "stem.0.norm."),
            (r"^cnn_stem\.1\.block\.0\.", "stem.2.block.1."),  # it has no convolution before the depthwise one
            (r"^cnn_stem\.1\.block\.1\.", "stem.2.block.2."),
            (r"^cnn_stem\.(\d)\.", lambda m: f"stem.{int(m[1]) + 1}."),
            (r"^cnn_body_stage4\.2\.0\.", "stages.3.blocks.2.0.conv."),
            (r"^cnn_body_stage4\.2\.1\.", "stages.3.blocks.2.0.norm."),
            (r"^cnn_body_stage(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
            (r"\.block\.\d\.fc1\.", ".gate.fc1."),
            (r"\.block\.\d\.fc2\.", ".gate.fc2."),
            (r"\.block\.(\d)\.0\.", lambda m: f".conv{min(int(m[1]) + 1, 3)}.conv."),
            (r"\.block\.(\d)\.1\.", lambda m: f".conv{min(int(m[1]) + 1, 3)}.norm."),
            (r"^classifier_cnn\.0\.", "head.cnn.hidden."),
            (r"^classifier_cnn\.3\.", "head.cnn.fc."),
            (r"^classifier_merge\.1\.", "head.merged.hidden."),
            (r"^classifier_merge\.4\.", "head.merged.fc."),
            *_LATENT_KEYS,
        ],
    }

    def __init__(
        self,
        *,
        width: float = 1.0,
        layout: Sequence[Sequence[tuple[int, int, int, bool, bool, int]]] = LAYOUT,
        num_latents: int = 128,
        latent_depths: Sequence[int] = (3, 3, 9, 9),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        latent_mlp_ratio: float = 4.0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        if len(layout) != STAGES + 1 or not all(layout):
            raise ValueError(
                f"DynPerceiverMobileNet: layout must have blocks of the stem and {STAGES} stages, got {layout}"
            )
        rates, make = drop_path_rates(drop_path_rate, [len(rows) for rows in layout]), _mixers(STAGES, mixers)
        make = [lambda dim: None, *make]
        dim = stem_dim = _divisible(16 * width)
        parts: list[list[nn.Module]] = []
        dims, reductions, reduction = [], [], 2
        for i, rows in enumerate(layout):
            blocks: list[nn.Module] = []
            for row, rate in zip(rows, rates[i], strict=True):
                kernel_size, mid, out, squeeze, hard, stride = row
                mid_dim, out_dim = _divisible(mid * width), _divisible(out * width)
                blocks.append(
                    Bottleneck(
                        dim,
                        out_dim,
                        mid_dim,
                        mixer=make[i](mid_dim),
                        stride=stride,
                        kernel_size=kernel_size,
                        inverted=True,
                        gate=partial(SEModule, rd_channels=_divisible(mid_dim / 4), gate_layer=HardSigmoid)
                        if squeeze
                        else None,
                        act_layer=nn.Hardswish if hard else nn.ReLU,
                        norm_layer=_norm,
                        drop_path=rate,
                    )
                )
                dim, reduction = out_dim, reduction * stride
            parts.append(blocks)
            dims.append(dim)
            reductions.append(reduction)
        last = ConvNorm(dim, 6 * dim, 1, bias=False, norm_layer=_norm)
        parts[-1].append(nn.Sequential(last, nn.Hardswish()))
        first = ConvNorm(in_chans, stem_dim, 3, 2, 1, bias=False, norm_layer=_norm)
        super().__init__(
            stem=Stem(first, nn.Hardswish(), *parts[0]),
            stages=parts[1:],
            in_dims=dims[:-1],
            out_dims=[*dims[1:-1], 6 * dim],
            reductions=reductions[1:],
            num_latents=num_latents,
            latent_depths=latent_depths,
            num_heads=num_heads,
            latent_mlp_ratio=latent_mlp_ratio,
            hidden_features=_divisible(1280 * width),
            in_chans=in_chans,
            **head,
        )


_SOURCE = "README.md of LeapLabTHU/Dynamic_Perceiver"
_WEIGHTS = "the authors publish them on cloud.tsinghua.edu.cn, see their README.md"


def _variant(kwargs: Mapping[str, Any], top1: float | None = None) -> Variant:
    if top1 is None:
        return Variant(kwargs)
    return Variant(kwargs, Published(top1=top1, source=_SOURCE), no_weights=_WEIGHTS)


RESNETS = {
    "zoo_dynperceiver_resnet18": _variant({"basic": True, "depths": (2, 2, 2, 2)}),
    "zoo_dynperceiver_resnet34": _variant({"basic": True}),
    "zoo_dynperceiver_resnet50_0375": _variant({"width": 0.375}, 77.7),
    "zoo_dynperceiver_resnet50_050": _variant({"width": 0.5}),
    "zoo_dynperceiver_resnet50_0625": _variant({"width": 0.625}),
    "zoo_dynperceiver_resnet50_075": _variant({"width": 0.75}),
    "zoo_dynperceiver_resnet50_100": _variant({}),
}

REGNETS = {
    "zoo_dynperceiver_regnet_400m": _variant({}),
    "zoo_dynperceiver_regnet_800m": _variant(
        {"depths": (1, 3, 8, 2), "embed_dims": (64, 144, 320, 784), "group_size": 16}, 79.86
    ),
    "zoo_dynperceiver_regnet_1600m": _variant(
        {"depths": (2, 6, 17, 2), "embed_dims": (48, 120, 336, 888), "group_size": 24}
    ),
    "zoo_dynperceiver_regnet_3200m": _variant(
        {"depths": (2, 5, 13, 1), "embed_dims": (72, 216, 576, 1512), "group_size": 24}
    ),
}

MOBILENETS = {
    "zoo_dynperceiver_mobilenetv3_050": _variant({"width": 0.5}),
    "zoo_dynperceiver_mobilenetv3_075": _variant({"width": 0.75}, 74.59),
    "zoo_dynperceiver_mobilenetv3_100": _variant({}),
    "zoo_dynperceiver_mobilenetv3_125": _variant({"width": 1.25}),
    "zoo_dynperceiver_mobilenetv3_150": _variant({"width": 1.5}),
    "zoo_dynperceiver_mobilenetv3_200": _variant({"width": 2.0}),
}

VARIANTS = RESNETS | REGNETS | MOBILENETS

_SMALL = {"latent_depths": (1, 1, 1, 1)}
TINY: dict[str, dict[str, Any]] = {  # RegNet's blocks are ResNet's, with what MobileNet's have too
    "zoo_dynperceiver_resnet50_0375": {**_SMALL, "width": 0.125, "depths": (1, 1, 1, 1)},
    "zoo_dynperceiver_resnet18": {**_SMALL, "width": 0.125, "depths": (1, 1, 1, 1)},
    "zoo_dynperceiver_mobilenetv3_075": {
        **_SMALL,
        "width": 0.5,
        "layout": (
            ((3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2)),
            ((5, 72, 40, True, False, 2),),
            ((3, 100, 80, False, True, 2),),
            ((5, 120, 120, True, True, 2),),
            ((5, 160, 120, True, True, 1), (3, 120, 120, True, True, 1)),
        ),
    },
}

for _model, _names in (
    (DynPerceiverResNet, RESNETS),
    (DynPerceiverRegNet, REGNETS),
    (DynPerceiverMobileNet, MOBILENETS),
):
    register_family(
        __name__,
        _model,
        _names,
        tiny=TINY,
        first_conv="stem.0.conv",
        classifier=("head.merged.fc", "head.early", "head.latent", "head.cnn.fc"),
        paper_ids="arXiv:2306.11248",
        origin_url="https://github.com/LeapLabTHU/Dynamic_Perceiver",
        license="mit",
    )
