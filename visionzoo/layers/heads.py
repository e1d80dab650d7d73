"""Classifier heads that timm does not have, on [B, C, H, W] maps as timm's."""

from __future__ import annotations

from typing import Any

from timm.layers import ClassifierHead
from torch import Tensor, nn

from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.nhwc import BatchNormNHWC


class ConvClassifierHead(ClassifierHead):
    """timm's `ClassifierHead` after a 1×1 convolution with batch norm and activation.

    Args:
        in_dim: channels of the map.
        num_classes: classes; 0 for pooled features, of `hidden_dim` channels.
        hidden_dim: channels of the convolution's output.
        act_layer: activation.
        options: `pool_type` and `drop_rate` of timm's head.
    """

    def __init__(
        self, in_dim: int, num_classes: int, *, hidden_dim: int, act_layer: type[nn.Module] = nn.ReLU, **options: Any
    ):
        super().__init__(hidden_dim, num_classes, **options)
        self.conv = ConvNorm(in_dim, hidden_dim, 1, bias=False, norm_layer=BatchNormNHWC)
        self.act = act_layer()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C, H, W] to logits [B, num_classes]; with `pre_logits` to what the classifier would see."""
        x = self.act(self.conv(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return super().forward(x, pre_logits=pre_logits)
