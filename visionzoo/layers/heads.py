"""Classification heads that timm does not have, on [B, C, H, W] maps like timm's."""

from __future__ import annotations

from timm.layers import ClassifierHead, SelectAdaptivePool2d
from torch import Tensor, nn

from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.nhwc import BatchNormNHWC


class BatchNormHead(nn.Module):
    """Pooling, batch normalisation, linear classifier; and a second pair of the last two that learns from a teacher.

    Args:
        in_features: channels C.
        num_classes: classes; 0 for pooled features, without any norm.
        pool_type: timm's pooling type; "" for none, with which there can be no classifier.
        drop_rate: dropout probability before the classifiers.
        distilled: have the second pair. Its logits are averaged with the first's, or returned beside them in training
            when `distilled_training` is set.
    """

    global_pool: SelectAdaptivePool2d

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        *,
        distilled: bool = False,
    ):
        super().__init__()
        self.in_features = in_features
        self.distilled = distilled
        self.distilled_training = False
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifiers and, where `pool_type` is given, the pooling."""
        pool_type = self.global_pool.pool_type if pool_type is None else pool_type
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        dim = self.in_features * self.global_pool.feat_mult()
        self.norm, self.fc = _norm_linear(dim, num_classes)
        if self.distilled:
            self.norm_dist, self.fc_dist = _norm_linear(dim, num_classes)
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W] to [B, num_classes]; with `pre_logits` to pooled features [B, C].

        Raises:
            ValueError: if there are classes and no pooling.
        """
        x = self.global_pool(x)
        if pre_logits or not self.num_classes:
            return x
        if not self.global_pool.pool_type:
            raise ValueError(
                f"BatchNormHead: a classifier needs pooling, got num_classes={self.num_classes} and "
                f"global_pool=''; give a pooling type, such as 'avg', or num_classes=0"
            )
        logits = self.fc(self.drop(self.norm(x)))
        if not self.distilled:
            return logits
        logits_dist = self.fc_dist(self.drop(self.norm_dist(x)))
        if self.distilled_training and self.training:
            return logits, logits_dist
        return (logits + logits_dist) / 2

    def fusible(self) -> list[tuple[str, str]]:
        """Names of the layers that follow each other directly in inference, for `visionzoo.fuse`."""
        return [("norm", "fc"), ("norm_dist", "fc_dist")] if self.distilled else [("norm", "fc")]


class ProjectionHead(ClassifierHead):
    """1×1 convolution with batch normalisation and activation, pooling, linear classifier.

    Args:
        in_features: channels C.
        num_classes: classes; 0 for pooled features after the projection.
        pool_type: timm's pooling type; "" for the map as it came, with which there can be no classifier.
        drop_rate: dropout probability before the classifier.
        hidden_features: channels C' of the projection.
        act_layer: its activation.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        *,
        hidden_features: int,
        act_layer: type[nn.Module] = nn.SiLU,
    ):
        super().__init__(hidden_features, num_classes, pool_type, drop_rate)
        self.proj = ConvNorm(in_features, hidden_features, 1, norm_layer=BatchNormNHWC)
        self.act = act_layer()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C, H, W] to [B, num_classes]; with `pre_logits` to pooled features [B, C']."""
        if not self.global_pool.pool_type:
            return x
        x = self.act(self.proj(x.permute(0, 2, 3, 1)))
        return super().forward(x.permute(0, 3, 1, 2), pre_logits)


def _norm_linear(dim: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    if not num_classes:
        return nn.Identity(), nn.Identity()
    linear = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return nn.BatchNorm1d(dim), linear
