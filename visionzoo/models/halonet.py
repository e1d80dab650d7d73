"""HaloNet: Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021.

https://arxiv.org/abs/2103.12731. The authors released neither code nor weights; the code here is our own.

`zoo_halonet_26t`, `_50ts`, `zoo_sehalonet_33ts` and `zoo_eca_halonext_26ts` are timm's networks (1.0.31, Apache-2.0)
with timm's weights, and follow timm's reading of halo attention: position terms are not scaled; what lies beyond the
map takes part as zeros; a strided block looks positions up by the count of its queries, not by their distances. timm
refuses maps that the blocks do not divide, ours treat the rest of a block as beyond the map (`mask_padding=True`
leaves all of that out). The 1×1 convolution before the head of `zoo_sehalonet_33ts` counts to the last stage here.

`zoo_halonet_h0` to `_h7` are the paper's. Their table is not taken from its text but from two transcriptions that
agree: https://github.com/leondgarse/keras_cv_attention_models at 687943d (MIT license), and models/halonet.py of
https://github.com/Weiyun1025/STM-Evaluation at 80c9ff1. Published parameters and top-1 are those in the former's
README at 943b82e. All eight come out with the parameters published (H6 with 43.46 million for 43.4), which speaks for
the table and for the shape of the blocks. Uncertain are: the heads, 4, 8, 8, 8 in both transcriptions (timm's
`halonet_h1` has 8 in the first stage too); ReLU, as in timm (SiLU in the former); and, all as in timm, where norms
sit, that the convolution to df channels has norm and activation, and the reading of halo attention. Crop and FLOPs
are not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from timm.layers import EcaModule, SqueezeExcite, get_act_layer
from torch import nn

from visionzoo.layers.bottleneck import Bottleneck
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import HaloMixer, build_mixer, resolve_mixers
from visionzoo.layers.stem import conv_stem
from visionzoo.models._contract import drop_path_rates
from visionzoo.models._pyramid import Pyramid, Stage
from visionzoo.models._registry import Published, Variant, register_family

GATES = {None: None, "eca": EcaModule, "se": SqueezeExcite}


class HaloNet(Pyramid):
    """HaloNet: bottleneck blocks, some or all of them with halo attention in place of the 3×3 convolution.

    Args:
        layout: the blocks of each stage, one letter each: "c" with convolution, "a" with attention.
        embed_dims: channels of each stage.
        mid_dims: channels between the 1×1 convolutions of a block, for each stage.
        num_heads: attention heads for each stage.
        block_size: side of the blocks that attend, in tokens. Where it is odd, a strided block attends at full
            resolution and is followed by average pooling, as in timm.
        halo_size: width of the rim that they attend to beside themselves, in tokens.
        head_dim: width of queries and keys of a head; None means mid_dims over heads.
        value_ratio: channels of the values over mid_dims, the paper's rv.
        stem_dims: channels of the stem's convolutions; the first has stride 2.
        stem_kernel: side of their kernels.
        stem_pool: max pooling of stride 2 at the end of the stem; without it the last convolution has stride 2 too.
        act: timm's name of the activation.
        gate: "se" (squeeze and excitation) or "eca" after the 3×3 convolutions, or None.
        group_size: channels a group of the 3×3 convolutions; None for one group.
        final_dim: channels of a 1×1 convolution with norm and activation that ends the last stage, the paper's df; None
            for none.
        mask_padding: leave what is beyond the map out of attention.
        mixers: other token mixers for the attention blocks of some stages, see
            `visionzoo.layers.mixers.resolve_mixers`; average pooling follows where the block has a stride.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if the stages' entries differ in number, the layout has other letters, the gate is unknown, or
            `mixers` names a stage without attention or the mixer "none".
    """

    UNFOLDED = r"\.norm2$"  # behind attention, not behind its projection
    DYNAMIC_SIZE = False

    CHECKPOINT_KEYS = {
        "timm": [
            (r"^stem\.conv(\d)\.", lambda m: f"stem.{2 * int(m[1]) - 2}."),
            (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"^final_conv\.", "stages.3.blocks.2.0."),  # only sehalonet33ts has it
            (r"\.attn\.", ".gate."),
            (r"\.conv(\d)_(1x1|kxk)\.", r".conv\1."),
            (r"\.self_attn\.(pos_embed\.)?", ".mixer."),
            (r"\.(height|width)_rel$", r".rel_\1"),
            (r"\.post_attn\.", ".norm2."),
            (r"\.bn\.", ".norm."),
        ],
    }

    def __init__(
        self,
        *,
        layout: Sequence[str] = ("aaa", "aaa", "aaaaaaaaaa", "aaa"),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        mid_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (4, 8, 8, 8),
        block_size: int = 8,
        halo_size: int = 3,
        head_dim: int | None = None,
        value_ratio: float = 1.0,
        stem_dims: Sequence[int] = (64,),
        stem_kernel: int = 7,
        stem_pool: bool = True,
        act: str = "relu",
        gate: str | None = None,
        group_size: int | None = None,
        final_dim: int | None = None,
        mask_padding: bool = False,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        if not len(layout) == len(embed_dims) == len(mid_dims) == len(num_heads):
            raise ValueError(
                f"HaloNet: expected one entry for each stage, got {layout=}, {embed_dims=}, {mid_dims=}, {num_heads=}"
            )
        if not all(letters and set(letters) <= {"c", "a"} for letters in layout):
            raise ValueError(f"HaloNet: expected a string of 'c' and 'a' for each stage, got {layout=}")
        if gate not in GATES:
            raise ValueError(f"HaloNet: expected gate 'se', 'eca' or None, got {gate=}")
        try:
            act_layer = get_act_layer(act)
        except KeyError:
            raise ValueError(f"HaloNet: unknown {act=}, expected timm's name of one, such as 'relu', 'silu'") from None
        halo = {
            "type": "halo",
            "block_size": block_size,
            "halo_size": halo_size,
            "head_dim": head_dim,
            "proj": False,
            "mask_padding": mask_padding,
        }
        own = [
            [{**halo, "value_dim": int(dim * value_ratio)}] if "a" in letters else []
            for dim, letters in zip(mid_dims, layout, strict=True)
        ]
        specs = resolve_mixers(own, mixers)
        for i, letters in enumerate(layout):
            if specs[i] and "a" not in letters and not isinstance(mixers, str | Mapping):
                raise ValueError(
                    f"HaloNet: mixers replace attention, and the blocks of stage {i} ({letters!r}) have none; expected "
                    f"None there, got {mixers=}"
                )
            if any(spec["type"] == "none" for spec in specs[i]):
                raise ValueError(
                    f"HaloNet: bottlenecks without token mixing do not exist, got {mixers=}; blocks with convolutions "
                    f"are the letter 'c' of layout={tuple(layout)}"
                )
        rates = drop_path_rates(drop_path_rate, [len(letters) for letters in layout])
        stages, in_dim = [], stem_dims[-1]
        for i, (dim, mid_dim) in enumerate(zip(embed_dims, mid_dims, strict=True)):
            blocks: list[nn.Module] = []
            turns = cycle(specs[i])
            for j, kind in enumerate(layout[i]):
                stride = 2 if i and j == 0 else 1
                block = Bottleneck(
                    in_dim,
                    dim,
                    mid_dim,
                    mixer=build_mixer(_strided(next(turns), stride), mid_dim, num_heads[i]) if kind == "a" else None,
                    stride=stride,
                    groups=mid_dim // group_size if group_size else 1,
                    gate=GATES[gate],
                    act_layer=act_layer,
                    drop_path=rates[i][j],
                )
                blocks.append(block)
                in_dim = dim
            if final_dim is not None and i == len(layout) - 1:
                final = ConvNorm(in_dim, final_dim, 1, bias=False, norm_layer=nn.BatchNorm2d)
                blocks.append(nn.Sequential(final, act_layer()))
            stages.append(Stage(nn.Identity(), blocks))
        stem_strides = [2, *[1] * (len(stem_dims) - 1)]
        if not stem_pool:
            stem_strides[-1] = 2
        super().__init__(
            stem=conv_stem(in_chans, stem_dims, stem_kernel, stem_strides, act_layer, pool=stem_pool),
            stages=stages,
            embed_dims=(*embed_dims[:-1], final_dim or embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )

    def init_weights(self) -> None:
        """Initialize as timm does, and blocks as identities."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, HaloMixer):
                module.init_weights()
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3.norm.weight)  # type: ignore[arg-type]


def _strided(spec: dict[str, Any], stride: int) -> dict[str, Any]:
    """Let halo attention do the block's stride itself, unless it halves a block of odd size."""
    return {**spec, "stride": stride} if spec["type"] == "halo" and spec["block_size"] % stride == 0 else spec


def _paper(
    size: int, block_size: int, halo_size: int, rv: float, rb: float, depth: int, df: int | None, *published: float
) -> Variant:
    params_m, top1 = published
    kwargs = {
        "layout": ("aaa", "aaa", "a" * depth, "aaa"),
        "embed_dims": tuple(int(rb * dim) for dim in (64, 128, 256, 512)),
        "block_size": block_size,
        "halo_size": halo_size,
        "value_ratio": rv,
        "final_dim": df,
    }
    side = -(-size // 32)
    return Variant(
        kwargs,
        Published(params_m, None, top1, size, "paper, by the README of leondgarse/keras_cv_attention_models"),
        {"input_size": (3, size, size), "pool_size": (side, side)},
        "the authors released none",
    )


def _timm(
    weights: str, crop_pct: float, published: tuple[float, float, float], layout: Sequence[str], **kwargs: Any
) -> Variant:
    _, tag = weights.split(".")
    return Variant(
        {
            "layout": layout,
            "embed_dims": (256, 512, 1024, 2048),
            "num_heads": (8, 8, 8, 8),
            "stem_dims": (24, 32, 64),
            "stem_kernel": 3,
            **kwargs,
        },
        Published(*published, 256, "timm's results-imagenet.csv and benchmark-infer-*-rtx3090.csv"),
        {
            "tag": tag,
            "hf_hub_id": f"timm/{weights}",
            "input_size": (3, 256, 256),
            "pool_size": (8, 8),
            "crop_pct": crop_pct,
        },
    )


_X26 = ("cc", "cc", "ca", "aa")

VARIANTS = {
    # size, block, halo, rv, rb, blocks of the third stage, df, parameters in millions, top-1
    "zoo_halonet_h0": _paper(256, 8, 3, 1.0, 0.5, 7, None, 5.5, 77.9),
    "zoo_halonet_h1": _paper(256, 8, 3, 1.0, 1.0, 10, None, 8.1, 79.9),
    "zoo_halonet_h2": _paper(256, 8, 3, 1.0, 1.25, 11, None, 9.4, 80.4),
    "zoo_halonet_h3": _paper(320, 10, 3, 1.0, 1.5, 12, 1024, 11.8, 81.9),
    "zoo_halonet_h4": _paper(384, 12, 2, 1.0, 3.0, 12, 1280, 19.1, 83.3),
    "zoo_halonet_h5": _paper(448, 14, 2, 2.5, 2.0, 23, 1536, 30.7, 84.0),
    "zoo_halonet_h6": _paper(512, 8, 4, 3.0, 2.75, 24, 1536, 43.4, 84.4),
    "zoo_halonet_h7": _paper(600, 10, 3, 4.0, 3.5, 26, 2048, 67.4, 84.9),
    "zoo_halonet_26t": _timm("halonet26t.a1h_in1k", 0.95, (12.48, 3.19, 79.134), _X26, halo_size=2),
    "zoo_halonet_50ts": _timm(
        "halonet50ts.a1h_in1k",
        0.94,
        (22.73, 5.3, 81.64),
        ("ccc", "ccca", "cacaca", "cac"),
        num_heads=(8, 4, 8, 8),
        act="silu",
    ),
    "zoo_sehalonet_33ts": _timm(
        "sehalonet33ts.ra2_in1k",
        0.94,
        (13.69, 3.55, 80.976),
        ("cc", "cca", "cca", "aa"),
        embed_dims=(256, 512, 1024, 1536),
        stem_pool=False,
        act="silu",
        gate="se",
        final_dim=1280,
    ),
    "zoo_eca_halonext_26ts": _timm(
        "eca_halonext26ts.c1_in1k",
        0.94,
        (10.76, 2.44, 79.518),
        _X26,
        halo_size=2,
        head_dim=16,
        act="silu",
        gate="eca",
        group_size=16,
    ),
}

TINY: dict[str, dict[str, Any]] = {
    "zoo_halonet_h0": {
        "layout": ("a",) * 4,
        "embed_dims": (8, 16, 16, 24),
        "mid_dims": (8, 8, 16, 16),
        "num_heads": (1, 2, 2, 4),
        "stem_dims": (8,),
    },
    "zoo_sehalonet_33ts": {
        "layout": ("c", "c", "c", "ca"),
        "embed_dims": (16, 16, 32, 32),
        "mid_dims": (16, 16, 16, 16),
        "stem_dims": (8, 16),
        "num_heads": (1, 2, 2, 4),
        "group_size": 8,
    },
}

register_family(
    __name__,
    HaloNet,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0.conv",
    paper_ids="arXiv:2103.12731",
    origin_url="https://github.com/huggingface/pytorch-image-models",
    license="apache-2.0",
)
