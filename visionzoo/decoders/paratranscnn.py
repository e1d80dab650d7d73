"""ParaTransCNN: a ResNet and a pyramid of transformers side by side, WACV 2024, https://arxiv.org/abs/2401.15307.

Facts from model/ParaTransCNN.py and model/transformer.py of https://github.com/HongkunSun/ParaTransCNN at 2702b8b (no
license, so only facts are taken); the code here is our own. The authors' decoder takes three maps with widths that
double; here it takes 2 to 4 maps of any widths, and each upsampling halves the channels, which gives theirs. They take
images whose sides 16 divides; here patches are padded and maps resized where they do not fit. Attention's weights are
not dropped, and its output has one dropout that keeps what their two do. The ResNet starts untrained unless
`pretrained_resnet` asks for weights, which the authors always load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from visionzoo.decoders.base import Decoder, conv_norm_act, resize
from visionzoo.decoders.segmentor import pyramid_levels, pyramid_maps
from visionzoo.layers.arguments import Positive
from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.gates import GateNCHW, build_gate
from visionzoo.layers.mixers.full import FullMixer
from visionzoo.layers.specs import Spec

# of the authors' network, whose parts have no names of their own
CHECKPOINT_KEYS = [
    (r"^SE_(\d)\.fc\.0\.", lambda m: f"decoder.gates.{3 - int(m[1])}.gate.layer.fc1."),
    (r"^SE_(\d)\.fc\.2\.", lambda m: f"decoder.gates.{3 - int(m[1])}.gate.layer.fc2."),
    (r"^decoder(\d)\.conv([13])\.", lambda m: f"decoder.convs.{3 - int(m[1])}.{int(m[2]) // 2}.conv."),
    (r"^decoder(\d)\.norm([13])\.", lambda m: f"decoder.convs.{3 - int(m[1])}.{int(m[2]) // 2}.bn."),
    (r"^up(\d)_1\.", lambda m: f"decoder.up.{int(m[1]) - 1}."),
    (r"^out\.", "decoder.classifier."),
    (r"^first(conv|bn)\.", r"backbone.backbones.1.\g<1>1."),
    (r"^encoder(\d)\.", r"backbone.backbones.1.layer\1."),
    (r"^patch_embed_(\d)\.", lambda m: f"backbone.backbones.0.embed.{int(m[1]) - 1}.conv."),
    (r"^vit_(\d)\.net\.(\d+)\.fn\.", lambda m: f"backbone.backbones.0.blocks.{int(m[1]) - 1}.{_half(m[2])}."),
    (r"\.even\.norm\.", ".norm1."),
    (r"\.even\.fn\.", ".mixer.0."),
    (r"\.odd\.norm\.", ".norm2."),
    (r"\.odd\.fn\.net\.0\.", ".mlp.fc1."),
    (r"\.odd\.fn\.net\.3\.", ".mlp.fc2."),
]


def _half(layer: str) -> str:
    """Return the block of a layer of the authors, who count attention and MLP in turn, and which of these it is."""
    return f"{int(layer) // 2}.{('even', 'odd')[int(layer) % 2]}"


class ParaTransCNNDecoder(Decoder):
    """ParaTransCNN's decoder (arXiv:2401.15307): a U-Net's, over maps that channel attention weighs.

    From the coarsest map on, each passes a gate, is joined with what came from below, and passes two 3×3 convolutions
    with batch norm and ReLU. A transposed convolution then doubles height and width and halves the channels; the last
    one makes maps of four times the finest map's height and width, which the classifier reads. For maps of two
    backbones build it on `ParallelBackbones`.

    Args:
        in_channels: channels of the 2 to 4 maps, finest first.
        num_classes: classes.
        embed_dim: channels before the classifier.
        gate: of each map, see `visionzoo.layers.gates`; None for squeeze-and-excitation without biases, whose hidden
            width is a sixteenth (at least 1), as the authors have it.

    Raises:
        ValueError: if there are other than 2 to 4 maps, a width is not positive, or the gate cannot be built.

    >>> maps = [torch.zeros(1, 8, 6, 9), torch.zeros(1, 16, 3, 5)]
    >>> ParaTransCNNDecoder([8, 16], num_classes=4, embed_dim=8)(maps).shape
    torch.Size([1, 4, 24, 36])
    """

    SCALE = 4

    def __init__(
        self, in_channels: Sequence[Positive], num_classes: Positive, *, embed_dim: int = 320, gate: Spec | None = None
    ):
        super().__init__(in_channels, num_classes)
        if embed_dim < 1:
            raise ValueError(f"ParaTransCNNDecoder: embed_dim must be 1 or more, got {embed_dim=}")
        gates, convs, ups = [], [], []
        below = 0
        for i, dim in reversed(list(enumerate(in_channels))):
            own: Any = {"type": "se", "reduction": min(16, dim), "bias": False} if gate is None else gate
            gates.append(GateNCHW(build_gate(own, dim)))
            width = dim + below
            convs.append(nn.Sequential(*(conv_norm_act(width, width, 3, bias=True) for _ in range(2))))
            below, side = (max(width // 2, 1), 2) if i else (embed_dim, self.SCALE)
            ups.append(nn.ConvTranspose2d(width, below, side, side))
        self.gates, self.convs, self.up = (nn.ModuleList(layers[::-1]) for layers in (gates, convs, ups))
        self.classifier = nn.Conv2d(embed_dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps [B, C, H, W], finest first, into logits [B, num_classes, 4·H, 4·W], H and W of the first."""
        self.check_maps(maps, self.in_channels)
        below: list[Tensor] = []
        for x, gate, convs, up in reversed(list(zip(maps, self.gates, self.convs, self.up, strict=True))):
            x = torch.cat([gate(x), *(resize(y, x) for y in below)], 1)
            below = [up(convs(x))]
        return self.classifier(below[0])


class ParallelBackbones(nn.Module):
    """Backbones side by side: their maps of one stride are joined along the channels.

    Args:
        backbones: two or more that give the maps of one image, as timm's `features_only=True` does. Of each stride that
            all have the last map is taken; those of later backbones are resized to the first's size.

    Raises:
        ValueError: if they have fewer than two strides in common, or one does not describe its maps.

    >>> import timm, visionzoo
    >>> parts = (timm.create_model(name, features_only=True) for name in ("test_resnet", "zoo_pvtv2_b0"))
    >>> model = visionzoo.create_segmentor(ParallelBackbones(*parts), "paratranscnn", num_classes=5).eval()
    >>> model(torch.zeros(1, 3, 50, 70)).shape
    torch.Size([1, 5, 50, 70])
    """

    def __init__(self, *backbones: nn.Module):
        super().__init__()
        found: list[dict[int, tuple[int, int]]] = []
        for backbone in backbones:
            levels, info = pyramid_levels(backbone), cast(FeatureInfo, backbone.feature_info)
            strides, channels = info.reduction(), info.channels()
            found.append({strides[i]: (i, channels[i]) for i in levels})
        common = sorted(set.intersection(*map(set, found))) if found else []
        if len(common) < 2:
            raise ValueError(
                f"ParallelBackbones: expected backbones with two strides or more in common, got strides "
                f"{[sorted(strides) for strides in found]}"
            )
        self.backbones = nn.ModuleList(backbones)
        self.levels = [[strides[stride][0] for stride in common] for strides in found]
        self.feature_info = FeatureInfo(
            [
                {"num_chs": sum(strides[s][1] for strides in found), "reduction": s, "module": f"level{i}"}
                for i, s in enumerate(common)
            ],
            tuple(range(len(common))),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_chans, H, W] to the joined maps [B, C, H', W'], finest first."""
        maps = [pyramid_maps(backbone, levels, x) for backbone, levels in zip(self.backbones, self.levels, strict=True)]
        return [torch.cat([first, *(resize(y, first) for y in rest)], 1) for first, *rest in zip(*maps, strict=True)]


class PyramidTransformer(nn.Module):
    """ParaTransCNN's transformer: patches of 4, then of 2 twice, and full attention without positions at each stride.

    Time: O(N²·C) for the N positions of the finest map, of stride 4.

    Args:
        in_chans: image channels.
        dim: channels of the first map; they double at each stride.
        depths: blocks of each stride, from 4 on.
        num_heads: heads of all of them.
        mlp_ratio: hidden width of the MLPs over the channels.
        drop_rate: probability with which attention's output is dropped, twice, and each MLP's layers.

    Raises:
        ValueError: if the heads do not divide the channels.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        dim: int = 320,
        depths: Sequence[int] = (3, 3, 3),
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.1,
    ):
        super().__init__()
        dims = [dim * 2**i for i in range(len(depths))]
        sides = [4] + [2] * (len(depths) - 1)
        widths = zip([in_chans, *dims], dims, sides, strict=False)
        self.embed = nn.ModuleList(ConvNorm(a, b, side, side, pad_to_stride=True) for a, b, side in widths)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(
                        width,
                        nn.Sequential(FullMixer(width, num_heads), nn.Dropout(1 - (1 - drop_rate) ** 2)),
                        mlp_ratio=mlp_ratio,
                        mlp_drop=drop_rate,
                    )
                    for _ in range(depth)
                )
            )
            for width, depth in zip(dims, depths, strict=True)
        )
        info = [{"num_chs": c, "reduction": 4 * 2**i, "module": f"blocks.{i}"} for i, c in enumerate(dims)]
        self.feature_info = FeatureInfo(info, tuple(range(len(dims))))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_chans, H, W] to maps [B, C, ⌈H/4⌉, ⌈W/4⌉] and on, finest first."""
        x = x.permute(0, 2, 3, 1).contiguous()
        maps = []
        for embed, blocks in zip(self.embed, self.blocks, strict=True):
            x = blocks(embed(x))
            maps.append(x.permute(0, 3, 1, 2))
        return maps


def paratranscnn_encoder(
    *, in_chans: int = 3, resnet: str = "resnet34.tv_in1k", pretrained_resnet: bool = False, **transformer: Any
) -> ParallelBackbones:
    """Build ParaTransCNN's encoder: `PyramidTransformer` and a ResNet without the pooling of its stem.

    Args:
        in_chans: image channels.
        resnet: name of a ResNet of timm.
        pretrained_resnet: start it from the weights that timm's hub has for it.
        transformer: options of `PyramidTransformer`.
    """
    convs: Any = timm.create_model(
        resnet, pretrained=pretrained_resnet, features_only=True, out_indices=(2, 3, 4), in_chans=in_chans
    )
    convs.maxpool = nn.Identity()
    convs.feature_info = FeatureInfo(
        [{**info, "reduction": info["reduction"] // 2} for info in convs.feature_info.info], (2, 3, 4)
    )
    return ParallelBackbones(PyramidTransformer(in_chans=in_chans, **transformer), convs)
