"""What decoders have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

from visionzoo.layers.arguments import Positive
from visionzoo.layers.part import Part


class Decoder(Part):
    """Maps of a pyramid to logits for each pixel of the finest.

    One that learns from more than its logits declares the weights of its terms and exits in `AUXILIARY`, calls
    `add_term` in training, and gives the exits in `decode`.

    Subclasses are called as `XDecoder(in_channels, num_classes, *, …)` and take from 2 to `LEVELS` maps of any size,
    which `forward` begins by checking: `self.check_maps(maps, self.in_channels)`.

    Args:
        in_channels: channels of the maps, finest first.
        num_classes: classes.

    Raises:
        ValueError: if there are fewer than 2 or more than `LEVELS` maps, or no class.
    """

    LEVELS: ClassVar[int] = 4  # maps that it takes, of a backbone that has more the coarsest
    SCALE: ClassVar[int] = 1  # height and width of the logits over those of the first map
    CLASSIFIER: ClassVar[str] = "classifier"  # the layer whose outputs are the classes
    AUXILIARY: Mapping[str, float] = {}  # weights in the loss of exits and terms, by name
    CHECKPOINT_KEYS: ClassVar[dict[str, list[tuple[str, Any]]]] = {}  # others' names, as `Contract` has them

    def __init__(self, in_channels: Sequence[Positive], num_classes: Positive):
        super().__init__()
        if not 2 <= len(in_channels) <= self.LEVELS:
            raise ValueError(
                f"{type(self).__name__}: expected the channels of 2 to {self.LEVELS} maps, finest first, got "
                f"{in_channels=}"
            )
        self.in_channels, self.num_classes = tuple(in_channels), num_classes

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps [B, C, H, W], finest first, into logits [B, num_classes, H, W], `SCALE` times the first's size."""
        raise NotImplementedError

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return what `forward` does, and the logits of other classifiers, by name, that training also learns from."""
        return self(maps), {}


def conv_norm_act(
    in_dim: int, out_dim: int, kernel_size: int = 1, *, bias: bool = False, act_layer: str = "relu"
) -> nn.Module:
    """Convolution of stride 1, batch norm and an activation (timm's name) on [B, C, H, W]."""
    return ConvNormAct(in_dim, out_dim, kernel_size, bias=bias, act_layer=act_layer)


def resize(x: Tensor, like: Tensor, mode: str = "bilinear", align_corners: bool | None = False) -> Tensor:
    """Interpolate [B, C, H', W'] to the height and width of `like`."""
    return F.interpolate(x, like.shape[-2:], mode=mode, align_corners=align_corners)
