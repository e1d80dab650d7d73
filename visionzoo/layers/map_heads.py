"""Heads that read the last map of any backbone by a pooling of their own.

`timm.create_model("zoo_...", head=...)` takes them in place of the model's own: a name of
`visionzoo.models._heads.HEADS`, or `dict(type=name, **options)`.
"""

from __future__ import annotations

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from visionzoo.layers.arguments import Natural, Positive, Share
from visionzoo.layers.heads import adapt, linear
from visionzoo.layers.part import Part


class MapHead(Part):
    """A head on the last map [B, C, H, W] of a backbone, whatever H and W.

    Subclasses make logits of it (`classify`), pool it to `in_features` channels C' (`pool`) and make what depends on
    the classes (`make_classifier`).

    Args:
        num_classes: classes; 0 for pooled features.
        pool_type: "" for the map as it came, with which there can be no classifier; else the head's own pooling.
        drop_rate: dropout probability before the classifier.
    """

    in_features: int
    channels: int | None = None  # C of the map; None for any

    def __init__(self, num_classes: Natural, pool_type: str, drop_rate: Share):
        super().__init__()
        self.num_classes, self.pool_type = num_classes, pool_type
        self.drop = nn.Dropout(drop_rate)

    def pool(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C']."""
        raise NotImplementedError

    def classify(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, num_classes]."""
        raise NotImplementedError

    def make_classifier(self) -> None:
        """Make what depends on `num_classes`, anew."""
        raise NotImplementedError

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifier and, where `pool_type` is given, leave out the pooling ("") or have it again."""
        self.num_classes = num_classes
        self.pool_type = self.pool_type if pool_type is None else pool_type
        like = next(self.parameters())
        self.make_classifier()
        adapt(self, like)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C, H, W] to [B, num_classes]; with `pre_logits` to pooled features [B, C'].

        Raises:
            ValueError: if there are classes and no pooling.
        """
        self.check_inputs("B C H W", x, C=self.channels)
        if pre_logits or not self.num_classes:
            return self.pool(x) if self.pool_type else x
        if not self.pool_type:
            raise ValueError(
                f"{type(self).__name__}: a classifier needs pooling, got num_classes={self.num_classes} and "
                f"global_pool=''; leave global_pool out, or pass num_classes=0"
            )
        return self.classify(x)


class ProbeHead(MapHead):
    """A pooling of tokens, batch norm without weights, linear classifier.

    Args:
        pooling: [B, N, C] to [B, C'].
        in_features: channels C'.
        norm: have the batch norm, of eps 1e-6 (the probing of MAE, arXiv:2111.06377).
        num_classes: classes; 0 for pooled features.
        pool_type: see `MapHead`.
        drop_rate: dropout probability before the classifier.
    """

    def __init__(
        self, pooling: nn.Module, in_features: int, norm: bool, num_classes: int, pool_type: str, drop_rate: float
    ):
        super().__init__(num_classes, pool_type, drop_rate)
        self.in_features, self.has_norm = in_features, norm
        self.pooling = pooling
        self.make_classifier()

    def make_classifier(self) -> None:
        """Make the batch norm and the linear layer anew."""
        has_norm = self.has_norm and self.num_classes
        self.norm = nn.BatchNorm1d(self.in_features, affine=False, eps=1e-6) if has_norm else nn.Identity()
        self.fc = linear(self.in_features, self.num_classes)

    def pool(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C']."""
        return self.pooling(x.flatten(2).mT)

    def classify(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, num_classes]."""
        return self.fc(self.drop(self.norm(self.pool(x))))

    def fusible(self) -> list[tuple[str, str]]:
        """Names of the layers that follow each other directly in inference, for `visionzoo.fuse`."""
        return [("norm", "fc")]


class AttentiveHead(ProbeHead):
    """Attentive probing: what a learned query sees, batch norm without weights, linear classifier.

    The pooling is timm's `AttentionPoolLatent` (that of SigLIP, arXiv:2303.15343), with projections of the query, keys,
    values and output and an MLP behind them: (4 + 2·mlp_ratio)·C² weights.

    Args:
        in_features: channels C.
        num_classes: classes; 0 for pooled features.
        pool_type: see `MapHead`.
        drop_rate: dropout probability before the classifier.
        num_heads: of the attention; they divide C.
        mlp_ratio: hidden width of the MLP over C.
        norm: have the batch norm.

    Raises:
        ValueError: if the channels do not divide by the heads, or there is no width for the MLP.

    >>> AttentiveHead(16, 10, num_heads=2)(torch.zeros(2, 16, 3, 5)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: Positive,
        num_classes: Natural,
        pool_type: str = "attentive",
        drop_rate: Share = 0.0,
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        norm: bool = True,
    ):
        check_divisor("AttentiveHead", "num_heads", num_heads, in_features, f"the {in_features} channels")
        if mlp_ratio <= 0:
            raise ValueError(f"AttentiveHead: mlp_ratio must be above 0, got {mlp_ratio=}; leave it out for 4.0")
        pooling = AttentionPoolLatent(in_features, num_heads=num_heads, mlp_ratio=mlp_ratio, norm_layer=nn.LayerNorm)
        super().__init__(pooling, in_features, norm, num_classes, pool_type, drop_rate)
        self.channels = in_features


class EfficientProbing(Part):
    """Pooling of tokens by learned queries without projections of queries and keys; each pools channels of its own.

    "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", Psomas et al., ICLR 2026,
    arXiv:2506.10178. Facts from https://github.com/billpsomas/efficient-probing at b8f4fb8, Apache-2.0; the code here
    is our own. One head only: with more, the authors' shapes do not fit.

    O(N·C·(M + C / d_out)) multiply-adds for N tokens and M queries.

    Args:
        dim: channels C.
        num_queries: queries M; they divide C / d_out.
        d_out: C over the width of the output; it divides C.
        qkv_bias: have a bias of the values.

    Raises:
        ValueError: if the widths do not divide.

    >>> EfficientProbing(16, num_queries=4, d_out=2)(torch.zeros(2, 15, 16)).shape
    torch.Size([2, 8])
    """

    NO_WEIGHT_DECAY = ("query",)

    def __init__(self, dim: Positive, *, num_queries: int = 32, d_out: int = 1, qkv_bias: bool = False):
        super().__init__()
        check_divisor("EfficientProbing", "d_out", d_out, dim, f"the {dim} channels")
        out = dim // d_out
        check_divisor("EfficientProbing", "num_queries", num_queries, out, f"the {out} channels of the output")
        self.query = nn.Parameter(torch.randn(1, num_queries, dim) * 0.02)
        self.v = nn.Linear(dim, out, bias=qkv_bias)
        self.scale = dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, C / d_out]."""
        seen = self.attention(x)
        groups = self.v(x).unflatten(2, (self.query.shape[1], -1))  # [B, N, M, C / (d_out·M)]
        return (seen.unsqueeze(2) @ groups.transpose(1, 2)).flatten(1)

    def attention(self, x: Tensor) -> Tensor:
        """Return how much each query sees of each token of [B, N, C]: [B, M, N], whose rows add up to 1."""
        self.check_inputs("B N C", x, C=self.query.shape[2])
        return (self.query * self.scale @ x.mT).softmax(-1)


class EfficientProbeHead(ProbeHead):
    """Efficient probing (EP): `EfficientProbing`, batch norm without weights, linear classifier.

    The queries see the tokens of the map; prefix tokens such as a class token are left out.

    Args:
        in_features: channels C.
        num_classes: classes; 0 for pooled features.
        pool_type: see `MapHead`.
        drop_rate: dropout probability before the classifier.
        num_queries: see `EfficientProbing`.
        d_out: see `EfficientProbing`.
        qkv_bias: see `EfficientProbing`.
        norm: have the batch norm.

    Raises:
        ValueError: if the widths do not divide.
    """

    def __init__(
        self,
        in_features: Positive,
        num_classes: Natural,
        pool_type: str = "ep",
        drop_rate: Share = 0.0,
        *,
        num_queries: int = 32,
        d_out: int = 1,
        qkv_bias: bool = False,
        norm: bool = True,
    ):
        pooling = EfficientProbing(in_features, num_queries=num_queries, d_out=d_out, qkv_bias=qkv_bias)
        super().__init__(pooling, in_features // d_out, norm, num_classes, pool_type, drop_rate)
        self.channels = in_features

    def attention(self, x: Tensor) -> Tensor:
        """Return how much each query sees of each place of a map [B, C, H, W]: [B, M, H, W]."""
        self.check_inputs("B C H W", x, C=self.channels)
        return self.pooling.attention(x.flatten(2).mT).unflatten(2, x.shape[2:])  # type: ignore[operator]


def check_divisor(what: str, name: str, value: int, width: int, of: str) -> None:
    """Raise ValueError unless `value` divides `width`."""
    if value < 1 or width % value:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        near = sorted(sorted(divisors, key=lambda n: abs(n - value))[:4])
        raise ValueError(
            f"{what}: {name} must divide {of}, got {name}={value}; pass one that does, such as "
            f"{', '.join(map(str, near))}"
        )
