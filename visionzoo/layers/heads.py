"""Classification heads that timm does not have: on [B, C, H, W] maps like timm's, and on tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, ClassifierHead, SelectAdaptivePool2d, global_pool_nlc
from timm.models.volo import ClassBlock
from torch import Tensor, nn

from visionzoo.layers.arguments import Natural, Positive, Share
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.nhwc import on_nhwc
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.part import Part
from visionzoo.text import count_of


class BatchNormHead(Part):
    """Pooling, batch normalization, linear classifier; and a second pair of the last two that learns from a teacher.

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
        in_features: Positive,
        num_classes: Natural,
        pool_type: str = "avg",
        drop_rate: Share = 0.0,
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
        like = next(self.parameters(), None)
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        dim = self.in_features * self.global_pool.feat_mult()
        self.norm, self.fc = _norm_linear(dim, num_classes)
        if self.distilled:
            self.norm_dist, self.fc_dist = _norm_linear(dim, num_classes)
        adapt(self, like)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W] to [B, num_classes]; with `pre_logits` to pooled features [B, C].

        Raises:
            ValueError: if there are classes and no pooling.
        """
        self.check_inputs("B C H W", x, C=self.in_features)
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


def adapt(head: nn.Module, like: nn.Parameter | None) -> None:
    """Bring a head's new layers to the mode, device and dtype that it had; a head without parameters had none."""
    if like is not None:
        head.to(device=like.device, dtype=like.dtype)
    head.train(head.training)


class ProjectionHead(Part, ClassifierHead):
    """1×1 convolution with batch normalization and activation, pooling, linear classifier.

    Args:
        in_features: channels C.
        num_classes: classes; 0 for pooled features after the projection.
        pool_type: timm's pooling type; "" for the map as it came, with which there can be no classifier.
        drop_rate: dropout probability before the classifier.
        hidden_features: channels C' of the projection.
        act_layer: its activation.
        bias: whether its convolution has a bias.
    """

    def __init__(
        self,
        in_features: Positive,
        num_classes: Natural,
        pool_type: str = "avg",
        drop_rate: Share = 0.0,
        *,
        hidden_features: Positive,
        act_layer: type[nn.Module] = nn.SiLU,
        bias: bool = True,
    ):
        super().__init__(hidden_features, num_classes, pool_type, drop_rate)
        self.proj = ConvNorm(in_features, hidden_features, 1, bias=bias, norm_layer=nn.BatchNorm2d)
        self.act = act_layer()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C, H, W] to [B, num_classes]; with `pre_logits` to pooled features [B, C']."""
        self.check_inputs("B C H W", x, C=self.proj.in_dim)
        if not self.global_pool.pool_type:
            return x
        x = self.act(self.proj(x.permute(0, 2, 3, 1)))
        return super().forward(x.permute(0, 3, 1, 2), pre_logits)


class HiddenLayerHead(Part, ClassifierHead):
    """1×1 convolution with batch norm and ReLU, pooling, hidden layer with ReLU, linear classifier (MobileNetV3's).

    Args:
        in_features: channels C.
        num_classes: classes; 0 for what the classifier would see.
        pool_type: timm's pooling type, of those that keep the width; "" for the map as it came, with which there can be
            no classifier.
        drop_rate: dropout probability before the classifier.
        conv_features: channels of the convolution.
        hidden_features: channels C' of the hidden layer.
    """

    def __init__(
        self,
        in_features: Positive,
        num_classes: Natural,
        pool_type: str = "avg",
        drop_rate: Share = 0.0,
        *,
        conv_features: Positive,
        hidden_features: Positive,
    ):
        super().__init__(hidden_features, num_classes, pool_type, drop_rate)
        self.conv = ConvNorm(in_features, conv_features, 1, bias=False, norm_layer=nn.BatchNorm2d)
        self.hidden = nn.Linear(conv_features, hidden_features)
        self.act = nn.ReLU()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C, H, W] to [B, num_classes]; with `pre_logits` to [B, C']."""
        self.check_inputs("B C H W", x, C=self.conv.in_dim)
        if not self.global_pool.pool_type:
            return x
        x = self.global_pool(self.act(on_nhwc(self.conv, x)))
        x = self.drop(self.act(self.hidden(x)))
        return x if pre_logits else self.fc(x)


class ClassAttentionHead(Part, ClassifierHead):
    """A class token that starts as the pooled map and attends to all tokens, norm, linear classifier.

    A second classifier, of every token, adds half its largest logit of each class (LV-ViT, arXiv:2104.10858).

    Args:
        in_features: channels C.
        num_classes: classes; 0 for the normalized class token.
        pool_type: timm's pooling type, of those that keep the width, that makes the class token; "" for the map as it
            came, with which there can be no classifier.
        drop_rate: dropout probability before the classifiers.
        num_heads: heads of the attention.
        mlp_ratio: hidden width of the MLP after it, over C.
        token_label: have the classifier of tokens.
        eps: of the norms.
    """

    def __init__(
        self,
        in_features: Positive,
        num_classes: Natural,
        pool_type: str = "avg",
        drop_rate: Share = 0.0,
        *,
        num_heads: Positive,
        mlp_ratio: float = 4.0,
        token_label: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__(in_features, num_classes, pool_type, drop_rate)
        norm_layer: Any = partial(LayerNorm, eps=eps)
        self.block = ClassBlock(in_features, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
        self.norm = norm_layer(in_features)
        self.fc_aux = linear(in_features, num_classes) if token_label else None

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:  # type: ignore[override]
        """Replace the classifiers and, where `pool_type` is given, the pooling."""
        super().reset(num_classes, pool_type)
        if self.fc_aux is not None:
            self.fc_aux = linear(self.in_features, num_classes)
            adapt(self, self.norm.weight)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C, H, W] to [B, num_classes]; with `pre_logits` to the class token [B, C]."""
        self.check_inputs("B C H W", x, C=self.in_features)
        if not self.global_pool.pool_type:
            return x
        tokens = torch.cat([self.global_pool(x).unsqueeze(1), x.flatten(2).mT], 1)
        tokens = self.drop(self.norm(self.block(tokens)))
        token = tokens[:, 0]
        if pre_logits or isinstance(self.fc, nn.Identity):
            return token
        logits = self.fc(token)
        return logits if self.fc_aux is None else logits + 0.5 * self.fc_aux(tokens[:, 1:]).amax(1)


def _norm_linear(dim: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    return (nn.BatchNorm1d(dim) if num_classes else nn.Identity()), linear(dim, num_classes)


class TokenHead(Part):
    """Pooling of tokens, linear classifier; and a second classifier that learns from a teacher.

    Args:
        in_features: channels C.
        num_classes: classes; 0 for pooled features.
        pool_type: "token" (the first prefix token), "avg", "max" or "avgmax" over the map's tokens, "map" (attention
            of a learned query, SigLIP's), or "" for none, with which every token is classified.
        drop_rate: dropout probability before the classifiers.
        prefix_tokens: how many tokens are not the map's.
        distilled: have the second classifier, on the second prefix token (DeiT, arXiv:2012.12877). Its logits are
            averaged with the first's, or returned beside them in training when `distilled_training` is set.
        map_heads: heads of the attention of "map".
        norm_layer: called with C, for a norm of what is pooled; None for none.
    """

    POOLS: tuple[str, ...] = ("token", "avg", "max", "avgmax", "map", "")

    def __init__(
        self,
        in_features: Positive,
        num_classes: Natural,
        pool_type: str = "token",
        drop_rate: Share = 0.0,
        *,
        prefix_tokens: Natural = 1,
        distilled: bool = False,
        map_heads: Positive = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        self.dim = in_features  # of the tokens; a subclass may pool to other features
        self.in_features, self.prefix_tokens, self.map_heads = in_features, prefix_tokens, map_heads
        self.distilled, self.distilled_training = distilled, False
        self.pool_type = ""
        self.attn_pool: nn.Module | None = None
        self.norm = norm_layer(in_features) if norm_layer else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifiers and, where `pool_type` is given, the pooling.

        Raises:
            ValueError: if there is no such pooling, or no token for it.
        """
        pool_type = self.pool_type if pool_type is None else pool_type
        if pool_type not in self.POOLS:
            raise ValueError(f"TokenHead: global_pool must be one of {self.POOLS}, got {pool_type!r}")
        if pool_type == "token" and not self.prefix_tokens:
            raise ValueError("TokenHead: global_pool='token' needs a class token, and the model has none; pass 'avg'")
        if self.distilled and pool_type not in ("token", ""):
            raise ValueError(
                f"TokenHead: a distilled head reads its two tokens, got global_pool={pool_type!r}; pass 'token', or "
                f"distilled=False"
            )
        like = next(self.parameters(), None)
        if pool_type != "map":
            self.attn_pool = None
        elif self.attn_pool is None:
            self.attn_pool = AttentionPoolLatent(self.in_features, num_heads=self.map_heads, norm_layer=nn.LayerNorm)
        self.pool_type, self.num_classes = pool_type, num_classes
        self.fc = linear(self.in_features, num_classes)
        if self.distilled:
            self.fc_dist = linear(self.in_features, num_classes)
        adapt(self, like)

    def pool(self, x: Tensor) -> Tensor:
        """[B, P + N, C] to [B, C], or the tokens as they are where there is no pooling."""
        if self.attn_pool is not None:
            return self.norm(self.attn_pool(x[:, self.prefix_tokens :]))
        return self.norm(global_pool_nlc(x, self.pool_type, self.prefix_tokens))

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, P + N, C] to [B, num_classes]; with `pre_logits` to pooled features [B, C]."""
        self.check_inputs("B N C", x, C=self.dim)
        least = self.prefix_tokens + (self.pool_type not in ("token", ""))
        if not torch.compiler.is_compiling() and isinstance(x, Tensor) and x.shape[1] < least:
            raise ValueError(
                f"{type(self).__name__}: expected {count_of(self.prefix_tokens, 'prefix token')} and those of a map, "
                f"got {count_of(x.shape[1], 'token')}"
            )
        if not (self.distilled and self.pool_type):
            x = self.pool(x)
            return x if pre_logits or not self.num_classes else self.fc(self.drop(x))
        x = self.norm(x)
        if pre_logits or not self.num_classes:
            return (x[:, 0] + x[:, 1]) / 2
        logits, logits_dist = self.fc(self.drop(x[:, 0])), self.fc_dist(self.drop(x[:, 1]))
        return (logits, logits_dist) if self.distilled_training and self.training else (logits + logits_dist) / 2


def linear(dim: int, num_classes: int) -> nn.Module:
    """Return a new linear classifier; nothing to do for no classes."""
    if not num_classes:
        return nn.Identity()
    linear = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


class BranchHead(nn.ModuleList):
    """A head for each branch; logits are their mean, pooled features are joined.

    Args:
        in_features: channels of all branches together.
        num_classes: classes; 0 for pooled features.
        pool_type: see the head; "" for none, with which there can be no classifier.
        drop_rate: dropout probability before the classifiers.
        dims: channels of each branch.
        head: called with (channels, num_classes, pool_type, drop_rate) for each.
    """

    def __init__(
        self,
        in_features: Positive,
        num_classes: Natural,
        pool_type: str = "token",
        drop_rate: Share = 0.0,
        *,
        dims: Sequence[int],
        head: Callable[..., nn.Module] = TokenHead,
    ):
        super().__init__(head(dim, num_classes, pool_type, drop_rate) for dim in dims)
        self.in_features = sum(each.in_features for each in self)  # type: ignore[misc]
        self.num_classes, self.pool_type = num_classes, pool_type

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifiers and, where `pool_type` is given, the pooling."""
        for head in self:
            head.reset(num_classes, pool_type)  # type: ignore[operator]
        self.num_classes, self.pool_type = num_classes, self.pool_type if pool_type is None else pool_type

    def forward(self, x: tuple[Tensor, ...], pre_logits: bool = False) -> Any:
        """Take what each branch's head takes, such as tokens [B, P + N, C], to [B, num_classes].

        With `pre_logits`, to joined features [B, ΣC].

        Raises:
            ValueError: if there are classes and no pooling.
        """
        out = tuple(head(tokens, pre_logits) for head, tokens in zip(self, x, strict=True))
        if not self.pool_type:
            if self.num_classes and not pre_logits:
                raise ValueError(
                    f"BranchHead: branches differ in tokens, a classifier needs pooling; got num_classes="
                    f"{self.num_classes} and global_pool=''; give a pooling, such as 'token', or num_classes=0"
                )
            return out
        return torch.cat(out, 1) if pre_logits or not self.num_classes else sum(out) / len(out)
