"""Pyramids for backbones whose maps begin at stride 16 or have one scale only, and attention among levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from visionzoo.layers.level_attention import LevelAttention
from visionzoo.models._checkpoint import rename
from visionzoo.text import count_of


@MODELS.register_module()
class UpsamplingFPN(BaseModule):
    """A feature pyramid with levels finer than the backbone's, by transposed convolutions.

    As EfficientViT (arXiv:2305.07027) and SHViT do for COCO, whose backbones begin at stride 16: the finest lateral
    map, after the top-down path, is doubled by 2×2 transposed convolutions, one for each further level.

    Args:
        in_channels: of the backbone's maps, finest first.
        out_channels: of all levels.
        num_outs: levels in all; those beyond the finer ones and the backbone's are coarser.
        num_upsamples: finer levels.
        add_extra_convs: make coarser levels by 3×3 convolutions of stride 2, the first on the backbone's last map (as
            RetinaNet does), instead of subsampling.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        num_upsamples: int,
        add_extra_convs: bool = False,
        init_cfg: Any = {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"},  # noqa: B006  mmdet's FPN's
    ):
        super().__init__(init_cfg)
        levels = num_upsamples + len(in_channels)
        if num_outs < levels:
            raise ValueError(
                f"UpsamplingFPN: {num_upsamples} finer and {count_of(len(in_channels), 'level')}, but {num_outs=}"
            )
        self.laterals = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.upsamples = nn.ModuleList(
            nn.ConvTranspose2d(out_channels, out_channels, 2, stride=2) for _ in range(num_upsamples)
        )
        self.convs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(levels))
        coarser = num_outs - levels
        sources = [in_channels[-1], *[out_channels] * coarser][:coarser] if add_extra_convs else []
        self.extra_convs = nn.ModuleList(
            nn.Conv2d(channels, out_channels, 3, stride=2, padding=1) for channels in sources
        )
        self.num_outs = num_outs

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Backbone maps [B, C, H, W], finest first, to `num_outs` levels [B, out_channels, H', W'], finest first."""
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in reversed(range(1, len(levels))):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[2:])
        for upsample in self.upsamples:
            levels.insert(0, upsample(levels[0]))
        outs = [conv(x) for conv, x in zip(self.convs, levels, strict=True)]
        source = maps[-1]
        for conv in self.extra_convs:
            source = conv(source)
            outs.append(source)
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


@MODELS.register_module()
class SimplePyramid(BaseModule):
    """ViTDet's simple feature pyramid (arXiv:2203.16527) from the one map of an isotropic backbone.

    Args:
        in_channels: of the map.
        out_channels: of all levels.
        scales: of the levels to the map: 4, 2, 1 and 1/2 give strides 4 to 32 from stride 16.
        num_outs: levels in all; those beyond `scales` are subsampled from the coarsest.
        norm_cfg: of the norms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int = 5,
        norm_cfg: Mapping[str, Any] = {"type": "LN2d", "eps": 1e-6},
        init_cfg: Any = None,
    ):
        super().__init__(init_cfg)
        self.num_outs = num_outs

        def level(scale: float) -> nn.Module:
            half, quarter = in_channels // 2, in_channels // 4
            resize: dict[float, tuple[int, list[nn.Module]]] = {
                4: (
                    quarter,
                    [
                        nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                        build_norm_layer(dict(norm_cfg), half)[1],
                        nn.GELU(),
                        nn.ConvTranspose2d(half, quarter, 2, stride=2),
                    ],
                ),
                2: (half, [nn.ConvTranspose2d(in_channels, half, 2, stride=2)]),
                1: (in_channels, []),
                0.5: (in_channels, [nn.MaxPool2d(2, stride=2)]),
            }
            if scale not in resize:
                raise ValueError(f"SimplePyramid: scales must be of 4, 2, 1 and 0.5, got {scales=}")
            channels, layers = resize[scale]
            return nn.Sequential(
                *layers,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                build_norm_layer(dict(norm_cfg), out_channels)[1],
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                build_norm_layer(dict(norm_cfg), out_channels)[1],
            )

        self.levels = nn.ModuleList(level(scale) for scale in scales)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Last map [B, C, H, W] of the backbone to levels [B, out_channels, H', W'], finest first."""
        outs = [level(maps[-1]) for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


@MODELS.register_module()
class LevelAttentionNeck(BaseModule):
    """A pyramid whose levels are refined by all of them: SDANet's neck for detectors (arXiv:2211.10763).

    Any neck makes the pyramid, mmdet's FPN as the authors have it, and `visionzoo.layers.level_attention` refines it.
    Checkpoints may have our names or those of the authors' `AttFPN`.

    Args:
        in_channels: of the backbone's maps, finest first.
        out_channels: of all levels.
        num_outs: levels.
        pyramid: type of the neck that makes them.
        attention: options of `LevelAttention`.
        init_cfg: of convolutions.
        options: further arguments of the pyramid. The authors' Cascade R-CNN has none, their DDOD start_level=1 and
            add_extra_convs="on_output".

    Raises:
        ValueError: an option of the attention is out of range.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        pyramid: str = "mmdet.FPN",
        attention: Mapping[str, Any] = {},
        init_cfg: Any = None,
        **options: Any,
    ):
        super().__init__(init_cfg)
        sizes = {"in_channels": list(in_channels), "out_channels": out_channels, "num_outs": num_outs}
        self.pyramid = MODELS.build({"type": pyramid, **sizes, **options})
        self.attention = LevelAttention(out_channels, num_outs, **attention)
        self.register_load_state_dict_pre_hook(type(self).take_names)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Backbone maps [B, C, H, W], finest first, to `num_outs` levels [B, out_channels, H', W'], finest first."""
        return self.attention(self.pyramid(maps))

    def take_names(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Give the neck's tensors in a checkpoint, whose names begin with `prefix`, our names, in place."""
        parts: dict[str, dict[str, Tensor]] = {"pyramid.": {}, "attention.": {}}
        for name in [name for name in state if name.startswith(prefix)]:
            own = name.removeprefix(prefix)
            part = "attention." if own.startswith(("attention.", "selective_attention_")) else "pyramid."
            parts[part][own.removeprefix(part)] = state.pop(name)
        parts["attention."] = rename(parts["attention."], self.attention)[0]
        for part, tensors in parts.items():
            state.update({f"{prefix}{part}{name}": value for name, value in tensors.items()})
