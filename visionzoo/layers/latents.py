"""Latents that look at a map and are written back onto it: the second branch of Dynamic Perceiver (arXiv:2306.11248).

Maps are [B, H, W, C]; latents are `Tokens` without places: height 1, N wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.layers import Mlp, SelectAdaptivePool2d
from torch import Tensor, nn

from visionzoo.layers.arguments import Natural, Positive, Share
from visionzoo.layers.attention import attend
from visionzoo.layers.mixers import FullMixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC, on_nhwc
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.outputs import recomputed
from visionzoo.layers.part import Part
from visionzoo.layers.pooling import pool_cells
from visionzoo.layers.tokens import TokenBlock, Tokens
from visionzoo.layers.tracing import replaced

CELLS = 7  # rows and columns to which a map is pooled before latents look at it


class Perceived(NamedTuple):
    """A map, and the latents that have looked at it so far."""

    x: Tensor  # [B, C, H, W], on which latents are written: what the next stage takes
    latents: tuple[Tokens, ...]  # after each self-attention
    feature: Tensor  # [B, C, H, W], what the last stage gave


class CrossAttention(Part):
    """Tokens attend to others with one head, then pass an MLP as wide as they are; both are residual.

    Args:
        dim: channels C of the tokens.
        context_dim: channels C' of those that they attend to.
        inner_dim: channels of queries, keys and values.
        places: number of tokens attended to, each of which has a learned vector added to its key; 0 for none.
    """

    def __init__(self, dim: Positive, context_dim: Positive, inner_dim: Positive, *, places: Natural = 0):
        super().__init__()
        self.dim, self.context_dim, self.places = dim, context_dim, places or None
        self.norm1, self.norm_context = LayerNorm(dim), LayerNorm(context_dim)
        self.q = nn.Linear(dim, inner_dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * inner_dim, bias=False)
        self.positions = nn.Parameter(torch.zeros(1, places, inner_dim)) if places else None
        self.proj = nn.Linear(inner_dim, dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, N, C], attending to [B, M, C'], to [B, N, C]."""
        self.check_inputs("B N C, B M D", x, context, C=self.dim, D=self.context_dim, M=self.places)
        k, v = self.kv(self.norm_context(context)).chunk(2, -1)
        if self.positions is not None:
            k = k + self.positions.to(k.dtype)
        q = self.q(self.norm1(x))
        x = x + self.proj(attend(q[:, None], k[:, None], v[:, None])[:, 0])
        return x + self.mlp(self.norm2(x))


class LatentReader(nn.Module):
    """Latents look at a map, then at each other.

    Args:
        dim: channels C of both.
        depth: blocks of self-attention.
        num_heads: their heads.
        mlp_ratio: hidden width of their MLPs over C.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, *, mlp_ratio: float = 4.0):
        super().__init__()
        self.dwc = DepthwiseConvNHWC(dim, 7)
        self.cross = CrossAttention(dim, dim, dim, places=CELLS * CELLS)
        self.blocks = nn.Sequential(
            *(TokenBlock(dim, FullMixer(dim, num_heads), mlp_ratio=mlp_ratio) for _ in range(depth))
        )
        self.grad_checkpointing = False

    def forward(self, x: Tensor, latents: Tokens) -> Tokens:
        """Map [B, H, W, C] and latents of C channels to latents."""
        cells = pool_cells(self.dwc(x, residual=x), (CELLS, CELLS)).flatten(1, 2)
        latents = replaced(latents, x=self.cross(latents.x, cells))
        for block in self.blocks:
            latents = recomputed(block, latents) if self.grad_checkpointing and self.training else block(latents)
        return latents


class FirstLatents(nn.Module):
    """Learned latents, after they have looked at the first map.

    Args:
        count: how many.
        dim: channels C.
        reader: how they look at the map.
    """

    def __init__(self, count: int, dim: int, reader: LatentReader):
        super().__init__()
        self.latent = nn.Parameter(torch.empty(count, dim))
        nn.init.trunc_normal_(self.latent, std=0.02)
        self.read = reader

    def forward(self, x: Tensor) -> Tokens:
        """Map [B, H, W, C] to latents."""
        latents = self.latent.repeat(x.shape[0], 1, 1).to(x.dtype)  # no view: FLOPs of those are not counted
        return self.read(x, Tokens(latents, (1, self.latent.shape[0])))


class LatentExchange(nn.Module):
    """Between two stages: latents become fewer and wider, are written onto the map, and look at it.

    Args:
        dims: channels of the latents, before and after; the map has the latter.
        counts: latents, before and after.
        reader: how they look at the map; None where they are not asked for.
    """

    read: LatentReader | None

    def __init__(self, dims: tuple[int, int], counts: tuple[int, int], reader: LatentReader):
        super().__init__()
        self.count = counts[1]
        self.merge_norm, self.merge = LayerNorm(counts[0]), nn.Linear(*counts)
        self.widen_norm, self.widen = LayerNorm(dims[0]), nn.Linear(*dims)
        self.write = CrossAttention(dims[1], dims[1], max(1, dims[1] // 8))
        self.read = reader

    def forward(self, x: Tensor, latents: Tokens) -> tuple[Tensor, Tokens]:
        """Take map [B, H, W, C] and latents to those of the next stage; the map keeps its size."""
        z = self.merge(self.merge_norm(latents.x.mT)).mT
        latents = Tokens(self.widen(self.widen_norm(z)), (1, self.count))
        x = self.write(x.flatten(1, 2), latents.x).view(x.shape)
        return x, latents if self.read is None else self.read(x, latents)


class ClassShortcut(Part):
    """What an earlier classifier says, as features of a later one.

    Args:
        num_classes: classes K.
        dim: channels C.
    """

    def __init__(self, num_classes: Positive, dim: Positive):
        super().__init__()
        self.num_classes = num_classes
        self.fc, self.norm, self.act = nn.Linear(num_classes, dim), nn.BatchNorm1d(dim), nn.ReLU()

    def forward(self, logits: Tensor) -> Tensor:
        """[B, K] to [B, C]."""
        self.check_inputs("B K", logits, K=self.num_classes)
        return self.act(self.norm(self.fc(logits)))

    def fusible(self) -> list[tuple[str, str]]:
        """Names of the layers that follow each other directly, for `visionzoo.fuse`."""
        return [("fc", "norm")]


class PooledClassifier(Part):
    """Dropout and a linear classifier of pooled features, with a hidden layer between where there is one.

    Args:
        in_features: channels C.
        num_classes: classes K.
        drop_rate: dropout probability before the classifier.
        hidden_features: channels of the hidden layer with Hardswish; None for none.
        norm: begin with a batch norm.
    """

    def __init__(
        self,
        in_features: Positive,
        num_classes: Positive,
        drop_rate: Share,
        hidden_features: Positive | None,
        *,
        norm: bool = False,
    ):
        super().__init__()
        self.in_features = in_features
        self.norm = nn.BatchNorm1d(in_features) if norm else nn.Identity()
        self.hidden: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()
        if hidden_features is not None:
            self.hidden, self.act = nn.Linear(in_features, hidden_features), nn.Hardswish()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(in_features if hidden_features is None else hidden_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] to [B, K]."""
        self.check_inputs("B C", x, C=self.in_features)
        return self.fc(self.drop(self.act(self.hidden(self.norm(x)))))

    def fusible(self) -> list[tuple[str, str]]:
        """Names of the layers that follow each other directly, for `visionzoo.fuse`."""
        return [("norm", "hidden" if isinstance(self.hidden, nn.Linear) else "fc")]


class PerceiverHead(Part):
    """Four classifiers of a map and of latents, of which the later ones hear what earlier ones say.

    `early` sees the mean of the latents before the last, `latent` that of the last ones and what `early` says, `cnn`
    the pooled map, and `merged` the pooled map on which the last latents are written, their mean, and what `latent`
    says. The last is the model's answer.

    Args:
        in_features: channels of what is pooled, those of the map and of the last latents together.
        num_classes: classes K; 0 for pooled features.
        pool_type: timm's pooling type of the map, of those that keep the width; "" for the features as they came, with
            which there can be no classifiers.
        drop_rate: dropout probability before the classifier of the map, and with a hidden layer before the last one.
        latent_dims: channels of the latents before the last, and of the last.
        hidden_features: channels of the hidden layers of both; None for none.
        weights: of the exits and of what they learn from the end, in the loss; they are the head's `AUXILIARY`.
    """

    global_pool: SelectAdaptivePool2d
    early: nn.Module
    early_shortcut: nn.Module
    latent: nn.Module
    latent_shortcut: nn.Module
    cnn: nn.Module
    merged: nn.Module

    def __init__(
        self,
        in_features: Positive,
        num_classes: Natural,
        pool_type: str = "avg",
        drop_rate: Share = 0.0,
        *,
        latent_dims: tuple[int, int],
        hidden_features: int | None,
        weights: Mapping[str, float],
    ):
        super().__init__()
        self.latent_dims, self.hidden_features, self.weights = latent_dims, hidden_features, weights
        self.in_features, self.drop_rate = in_features, drop_rate
        self.map_features = in_features - latent_dims[1]
        self.write = CrossAttention(self.map_features, latent_dims[1], max(1, self.map_features // 8))
        self.reset(num_classes, pool_type)

    @property
    def AUXILIARY(self) -> Mapping[str, float]:
        """Weights of exits and terms; there are none without classes."""
        return self.weights if self.num_classes else {}

    @property
    def fc(self) -> nn.Module | None:
        """The last linear layer; None without classes."""
        return self.merged.fc if isinstance(self.merged, PooledClassifier) else None

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace all classifiers and, where `pool_type` is given, the pooling."""
        pool_type = self.global_pool.pool_type if pool_type is None else pool_type
        like = self.write.q.weight
        before, last = self.latent_dims
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        layers: dict[str, nn.Module] = {}
        if num_classes:
            hidden = self.hidden_features
            with like.device:
                layers = {
                    "early": nn.Linear(before, num_classes),
                    "early_shortcut": ClassShortcut(num_classes, last),
                    "latent": nn.Linear(2 * last, num_classes),
                    "latent_shortcut": ClassShortcut(num_classes, last),
                    "cnn": PooledClassifier(self.map_features, num_classes, self.drop_rate, hidden),
                    "merged": PooledClassifier(
                        self.in_features + last, num_classes, self.drop_rate if hidden else 0.0, hidden, norm=True
                    ),
                }
        for name in ("early", "early_shortcut", "latent", "latent_shortcut", "cnn", "merged"):
            setattr(self, name, layers.get(name, nn.Identity()))
        self.to(dtype=like.dtype).train(self.training)

    def forward_early(self, before: Tensor) -> Tensor:
        """Latents before the last [B, N, C] to logits [B, K]."""
        return self.early(before.mean(1))

    def forward_latent(self, before: Tensor, last: Tensor) -> Tensor:
        """Latents before the last and the last ones to logits [B, K]."""
        said = self.early_shortcut(self.forward_early(before))
        return self.latent(torch.cat([last.mean(1), said], 1))

    def forward_cnn(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to logits [B, K]."""
        return self.cnn(self.global_pool(x))

    def forward(self, features: tuple[Tensor, Tensor, Tensor], pre_logits: bool = False) -> Any:
        """Map [B, C, H, W], latents before the last and the last to [B, K]; with `pre_logits` to what is pooled.

        Raises:
            ValueError: if there are classes and no pooling.
        """
        x, before, last = features
        first_dim, last_dim = self.latent_dims
        self.check_inputs("B C H W, B N D, B M E", x, before, last, C=self.map_features, D=first_dim, E=last_dim)
        if not self.global_pool.pool_type:
            if self.num_classes and not pre_logits:
                raise ValueError(
                    f"PerceiverHead: classifiers need pooling, got num_classes={self.num_classes} and global_pool=''; "
                    f"give a pooling type, such as 'avg', or num_classes=0"
                )
            return features
        x = on_nhwc(lambda m: self.write(m.flatten(1, 2), last).view(m.shape), x)
        pooled = torch.cat([self.global_pool(x), last.mean(1)], 1)
        if pre_logits or not self.num_classes:
            return pooled
        said = self.latent_shortcut(self.forward_latent(before, last))
        return self.merged(torch.cat([pooled, said], 1))
