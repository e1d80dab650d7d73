"""FFNet, "fuss-free networks": Simple and Efficient Architectures for Semantic Segmentation, CVPR 2022 workshop.

Facts from https://arxiv.org/abs/2206.08236 and https://github.com/Qualcomm-AI-research/FFNet at 2291ae7
(BSD-3-Clause-Clear, Qualcomm); the code here is our own. It is another FFNet than the backbone `zoo_ffnet_*`
(arXiv:2406.02021). The published networks are `ffnet*` of `visionzoo.decoders.list_segmentors()`, named as there in
lowercase: the depth, `s`, `n` or `ns` for narrower backbones, `d` where the first map has stride 8, then a letter each
for backbone, widths of the decoder and classifier, `mobile` for nearest neighbors in place of bilinear interpolation.
Those of which forms with `pre_down` exist see images of half the size; these forms halve them themselves.

Fewer than four maps, other widths and input channels are ours. The authors' classifiers for ImageNet are not here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import Tensor, nn

from visionzoo.decoders.base import Decoder, conv_norm_act, resize
from visionzoo.layers.arguments import Positive
from visionzoo.layers.part import Part
from visionzoo.layers.tracing import one_node


class FussFreeEncoder(Part):
    """FFNet's backbone (arXiv:2206.08236): a ResNet, mostly of basic blocks, that gives four maps.

    Args:
        depths: blocks of each stage: four, or three if the stem gives the first map.
        widths: channels of the stages, in bottlenecks before the expansion by 4; of the stem's map, too, if that is the
            first.
        stem: channels of the stem's 3×3 convolutions, of which the first two halve the map; () for one of 7×7 to 64
            channels and a max pooling.
        bottleneck: blocks are bottlenecks.
        first_stride: of the first stage: 1, or 2 for maps that begin at stride 8.
        pre_down: blur the image with a Gaussian and halve it first.
        in_chans: channels of the images.

    Raises:
        ValueError: if widths, stem or `first_stride` do not fit the depths, or a number is not positive.

    >>> encoder = FussFreeEncoder((1, 1, 1), (8, 8, 12, 16), stem=(8, 8, 8))
    >>> [tuple(x.shape) for x in encoder(torch.zeros(1, 3, 45, 67))]
    [(1, 8, 12, 17), (1, 8, 6, 9), (1, 12, 3, 5), (1, 16, 2, 3)]
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^(conv|bn)(\d)\.", r"stem.\1\2."),
            (r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
        ],
        "mmseg": [(r"^model\.", "")],  # of `SegmentorBackbone`
    }

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        stem: Sequence[int] = (),
        bottleneck: bool = False,
        first_stride: int = 1,
        pre_down: bool = False,
        in_chans: int = 3,
    ):
        super().__init__()
        stem_is_map = len(depths) == 3
        if len(depths) not in (3, 4) or len(widths) != 4 or min(*depths, *widths, *stem, in_chans) < 1:
            raise ValueError(
                "FussFreeEncoder: expected 3 or 4 positive depths, 4 widths and positive channels, got "
                f"{depths=}, {widths=}, {stem=}, {in_chans=}"
            )
        if len(stem) == 1 or (stem_is_map and (len(stem) < 2 or stem[-1] != widths[0])):
            raise ValueError(
                "FussFreeEncoder: the stem has none or at least two convolutions, and with 3 depths it ends with the "
                f"first of the widths, got {stem=}, {widths=}, {depths=}"
            )
        if first_stride not in ((1,) if stem_is_map else (1, 2)):
            raise ValueError(
                f"FussFreeEncoder: first_stride must be 1, or 2 with 4 depths, got {first_stride=}, {depths=}"
            )
        self.in_chans, self.pre_down = in_chans, pre_down
        self.stem = _stem(stem, in_chans)
        block = Bottleneck if bottleneck else BasicBlock
        planes, dim = list(widths), stem[-1] if stem else 64
        stride = 8 if pre_down else 4
        maps = [{"num_chs": dim, "reduction": stride, "module": "stem"}] if stem_is_map else []
        self.stages = nn.ModuleList()
        for depth in depths:
            step = first_stride if not maps else 2
            blocks: list[nn.Module] = []
            for i in range(depth):
                out, step = planes[len(maps)] * block.expansion, step if i == 0 else 1
                shortcut = downsample_conv(dim, out, 1, step) if step > 1 or dim != out else None
                blocks.append(block(dim, planes[len(maps)], step, shortcut))
                dim = out
            stride *= first_stride if not maps else 2
            maps.append({"num_chs": dim, "reduction": stride, "module": f"stages.{len(self.stages)}"})
            self.stages.append(nn.Sequential(*blocks))
        self.stem_is_map = stem_is_map
        self.feature_info = FeatureInfo(maps, tuple(range(len(maps))))
        self.apply(init_narrow)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_chans, H, W] to four maps [B, C, H', W'], finest first.

        Raises:
            ValueError: if x is no such image, or too small to be halved first.
        """
        self.check_inputs("B C H W", x, C=self.in_chans)
        x = self.stem(blur_and_halve(x) if self.pre_down else x)
        maps = [x] if self.stem_is_map else []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class FussFreeDecoder(Decoder):
    """FFNet's decoder (arXiv:2206.08236): a pyramid from coarse to fine, joined at the finest map's size.

    Each map is brought to its width by a 1×1 convolution. From the coarsest on, the sum so far is brought to the next
    map's width by another one, resized and added to it. A 3×3 convolution of each sum gives what is resized and joined,
    and what two more convolutions classify. All but the last have batch norm and ReLU.

    Args:
        in_channels: channels of the 2 to 4 maps, finest first.
        num_classes: classes.
        up: widths of maps and sums, finest first; the first entries where there are fewer maps. "a": 64, 128, 256, 512
            and 128 each; "b": 64, 128, 128, 256 and 96, 96, 64, 32; "c": 128 each and 128, 16, 16, 16.
        head: the classifying convolutions, the first one 3×3: "a" has 512 channels in between, "b" 256 and a second
            one of 3×3, "c" 128.
        mode: of interpolation: "bilinear", with aligned corners, or "nearest" as in the networks for mobile devices.

    Raises:
        ValueError: if there are other than 2 to 4 maps, or an option is none of these.

    >>> maps = [torch.zeros(1, 8, 6, 9), torch.zeros(1, 16, 3, 5), torch.zeros(1, 16, 2, 3)]
    >>> FussFreeDecoder([8, 16, 16], num_classes=4, up="c", head="c")(maps).shape
    torch.Size([1, 4, 6, 9])
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^layers\.0\.adapter_conv\.", "adapters."),
            (r"^layers\.1\.fam_(\d+)_up\.", lambda m: f"ups.{_level(m[1]) - 1}."),
            (r"^layers\.1\.fam_(\d+)(?:_sm)?\.", lambda m: f"smooths.{_level(m[1])}."),
            (r"\.layers\.0\.", ".conv."),
            (r"\.layers\.1\.", ".bn."),
            (r"^layers\.3\.last_layer\.0\.", "mid.conv."),
            (r"^layers\.3\.last_layer\.1\.", "mid.bn."),
            (r"^layers\.3\.last_layer\.3\.", "classifier."),
        ]
    }

    def __init__(
        self,
        in_channels: Sequence[Positive],
        num_classes: Positive,
        *,
        up: str = "b",
        head: str = "b",
        mode: str = "bilinear",
    ):
        super().__init__(in_channels, num_classes)
        for name, value, known in (("up", up, _UPS), ("head", head, _HEADS), ("mode", mode, _MODES)):
            if value not in known:
                raise ValueError(f"FussFreeDecoder: {name} must be one of {list(known)}, got {name}={value!r}")
        widths, outs = (entries[: len(in_channels)] for entries in _UPS[up])
        mid_dim, kernel_size = _HEADS[head]
        self.mode = mode
        self.adapters = nn.ModuleList(map(conv_norm_act, in_channels, widths))
        self.ups = nn.ModuleList(map(conv_norm_act, widths[1:], widths))  # from a level's width to that of the finer
        self.smooths = nn.ModuleList(conv_norm_act(dim, out, 3) for dim, out in zip(widths, outs, strict=True))
        self.mid = conv_norm_act(sum(outs), mid_dim, 3, bias=True)
        self.classifier = nn.Conv2d(mid_dim, num_classes, kernel_size, padding=kernel_size // 2)
        self.apply(init_narrow)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps [B, C, H, W], finest first, into logits [B, num_classes, H, W] at the size of the first."""
        outs = self.forward_levels(maps)
        joined = torch.cat([outs[0], *(self._resize(x, outs[0]) for x in outs[1:])], 1)
        logits: Tensor = self.classifier(self.mid(joined))
        return logits

    def forward_levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Turn maps [B, C, H, W], finest first, into the smoothed sums [B, C', H, W] of the same sizes."""
        self.check_maps(maps, self.in_channels)
        maps = [adapter(x) for adapter, x in zip(self.adapters, maps, strict=True)]
        x = maps[-1]
        outs = [self.smooths[-1](x)]
        for level in reversed(range(len(self.ups))):
            x = self._resize(self.ups[level](x), maps[level]) + maps[level]
            outs.insert(0, self.smooths[level](x))
        return outs

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        return resize(x, like, self.mode, _MODES[self.mode])


def _level(stride: str) -> int:
    return int(stride).bit_length() - 3  # 4, 8, 16, 32 -> 0, 1, 2, 3


_UPS = {  # -> widths of the maps; of the smoothed sums
    "a": ((64, 128, 256, 512), (128, 128, 128, 128)),
    "b": ((64, 128, 128, 256), (96, 96, 64, 32)),
    "c": ((128, 128, 128, 128), (128, 16, 16, 16)),
}
_HEADS = {"a": (512, 1), "b": (256, 3), "c": (128, 1)}  # -> channels in between, kernel of the last convolution
_MODES = {"bilinear": True, "nearest": None}  # -> align_corners


@one_node
def blur_and_halve(x: Tensor) -> Tensor:
    """Blur images [B, C, H, W] with a Gaussian of sigma 0.7 and take every second pixel, as FFNet's `pre_down` does.

    The kernel is that of scipy's `gaussian_filter` on an impulse in 5×5 pixels, which folds what lies outside back in.
    Rows are padded by their reflection, columns are not: [B, C, ⌊(H - 1) / 2⌋, ⌊(W - 3) / 2⌋] comes out.

    Raises:
        ValueError: if the images have less than 3 rows or 5 columns.
    """
    if x.shape[-2] < 3 or x.shape[-1] < 5:
        raise ValueError(f"FFNet with pre_down takes images of 3 rows and 5 columns or more, got {tuple(x.shape[-2:])}")
    offsets = torch.arange(-3, 4, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    weights = (offsets.square() * (-0.5 / 0.7**2)).exp()
    weights = weights / weights.sum()
    edge = weights[:1] + weights[1:2]
    row = torch.cat([edge, weights[2:5], edge]).to(x.dtype)
    channels = x.shape[1]
    kernel = torch.outer(row, row).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(x, (0, 0, 1, 1), mode="reflect"), kernel, stride=2, groups=channels)


def init_narrow(module: nn.Module) -> None:
    """Draw a convolution's weights with the deviation 0.01, as FFNet does; biases begin at 1e-4."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.constant_(module.bias, 1e-4)


_DEPTHS = {
    "18": (2, 2, 2, 2),
    "34": (3, 4, 6, 3),
    "50": (3, 4, 6, 3),
    "56": (4, 8, 12, 3),
    "86": (8, 12, 16, 6),
    "101": (3, 4, 23, 3),
    "134": (8, 18, 28, 12),
    "150": (16, 18, 28, 12),
    "40s": (4, 5, 6, 4),
    "54s": (5, 8, 8, 5),
    "78s": (6, 12, 12, 8),
    "86s": (8, 12, 16, 6),
    "150s": (16, 18, 28, 12),
    "46n": (6, 8, 8),
    "74n": (8, 12, 16),
    "122n": (16, 24, 20),
}
_WIDTHS = {  # -> channels of the stages, of the stem
    "": ((64, 128, 256, 512), ()),
    "s": ((64, 128, 192, 320), (32, 64)),
    "n": ((64, 96, 160, 320), (64, 64, 64)),
    "ns": ((64, 64, 128, 256), (64, 64, 64)),
}
_BOTTLENECKS = ("50", "101")
_MIOU = {  # form -> backbone -> mean IoU on the validation images of Cityscapes, from the authors' README
    "aaa": {"150": 84.4, "134": 84.1, "101": 82.1, "86": 83.2, "56": 82.5, "50": 79.6, "34": 81.4},
    "abb": {"150": 83.7, "86": 83.5, "56": 82.1, "34": 80.3},
    "bbb": {"150s": 84.1, "86s": 82.6},
    "cbb": {"122n": 83.7, "74n": 83.0, "46n": 81.9},
    "daaa": {"150": 82.3, "134": 82.0, "101": 80.4, "86": 81.4, "56": 80.7, "50": 79.4, "34": 79.1, "18": 76.5},
    "daac": {"150": 81.9, "86": 81.1, "34": 79.1, "18": 76.4},
    "dbbb": {"150s": 81.0, "86s": 81.1},
    "dbbb_mobile": {"86s": 81.5, "78s": 81.3, "54s": 80.8, "40s": 79.2},
    "bbb_mobile": {"150s": 81.6, "86s": 80.9, "78s": 80.5, "54s": 80.2, "40s": 79.7},
    "bcc_mobile": {"150s": 81.0, "86s": 81.0, "78s": 80.6, "54s": 79.9, "40s": 78.4},
    "cbb_mobile": {"122ns": 79.3, "74ns": 78.3, "46ns": 77.5},
    "ccc_mobile": {"122ns": 79.2, "74ns": 77.8, "46ns": 76.7},
}
_HALVED = ("bbb_mobile", "bcc_mobile", "cbb_mobile", "ccc_mobile")  # trained on halved images: `_pre_down` halves them


def published() -> Iterator[tuple[str, dict[str, Any], dict[str, Any], float]]:
    """Yield the networks that Qualcomm published: name, options of the encoder, the decoder, mean IoU in percent."""
    for form, backbones in _MIOU.items():
        letters, _, mobile = form.partition("_")
        decoder = {
            "type": "fuss_free",
            "up": letters[-2],
            "head": letters[-1],
            "mode": "nearest" if mobile else "bilinear",
        }
        for backbone, miou in backbones.items():
            widths, stem = _WIDTHS[backbone.lstrip("0123456789")]
            options = {
                "depths": _DEPTHS[backbone.replace("ns", "n")],
                "widths": widths,
                "stem": stem,
                "bottleneck": backbone in _BOTTLENECKS,
                "first_stride": 2 if letters[0] == "d" else 1,
            }
            yield f"ffnet{backbone}_{form}", options, decoder, miou
            if form in _HALVED:
                yield f"ffnet{backbone}_{form}_pre_down", {**options, "pre_down": True}, decoder, miou


def _stem(channels: Sequence[int], in_chans: int) -> nn.Sequential:
    """Build what brings an image to a quarter, with the authors' numbers of layers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    convs = [(out, 3, 2 if i < 2 else 1) for i, out in enumerate(channels)] or [(64, 7, 2)]
    for i, (out, kernel_size, stride) in enumerate(convs, first := 0 if channels else 1):
        layers[f"conv{i}"] = nn.Conv2d(in_chans, out, kernel_size, stride, kernel_size // 2, bias=False)
        layers[f"bn{i}"] = nn.BatchNorm2d(out)
        layers[f"act{i}"] = nn.ReLU(inplace=True)
        in_chans = out
    if first:
        layers["pool"] = nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(layers)
