"""INTR: a Transformer in which each class looks for itself in an image, ICLR 2024, https://arxiv.org/abs/2311.04157.

Facts from https://github.com/Imageomics/INTR at 69b8a69 (Apache-2.0); the code here is our own. Its frame is DETR's
(https://arxiv.org/abs/2005.12872), but each query is a class, and the keys of the cross-attention have no positions.
Where we differ: there is no mask of padded pixels, for the images of a batch are of one size; positions are computed in
float32 at least, not always in float32; the mean of the heads' attention is that of what the heads did, also with
`pre_norm`, where the released code computes it from something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from visionzoo.layers.arguments import Natural, Positive, Share
from visionzoo.layers.map_heads import MapHead, check_divisor
from visionzoo.layers.tracing import one_node

LONGEST = 50  # side of a map with learned positions


class ClassQueryHead(MapHead):
    """A query for each class, which looks for its class in the map, behind an encoder; there is no other classifier.

    Projection to `hidden_dim` channels d, `enc_layers` of self-attention over the map, `dec_layers` in which the class
    queries attend to each other and to the map, and one vector that reads the logit of each class from its query.

    O(enc·(N²·d + N·d²) + dec·(K²·d + K·N·d + K·d²)) for N places and K classes.

    Args:
        in_features: channels C of the map.
        num_classes: classes K; 0 for pooled features.
        pool_type: see `MapHead`. Pooled features are the mean of the encoder's output, [B, d]: what logits are read
            from is a vector for each class.
        drop_rate: dropout probability before the logits.
        hidden_dim: channels d; divisible by 4 and by `num_heads`.
        num_heads: heads of every attention.
        enc_layers: layers of the encoder.
        dec_layers: layers of the decoder.
        mlp_dim: hidden width of the MLPs.
        dropout: dropout probability in the layers.
        pre_norm: normalize before each branch, not after each sum.
        position: of the places of the map in the encoder: "sine", or "learned", which takes maps of 50 x 50 at most.

    Raises:
        ValueError: if the widths do not divide, or there are no layers.
    """

    def __init__(
        self,
        in_features: Positive,
        num_classes: Natural,
        pool_type: str = "intr",
        drop_rate: Share = 0.0,
        *,
        hidden_dim: int = 256,
        num_heads: int = 8,
        enc_layers: int = 6,
        dec_layers: int = 6,
        mlp_dim: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
        position: Literal["sine", "learned"] = "sine",
    ):
        if hidden_dim < 4 or hidden_dim % 4:
            raise ValueError(
                f"ClassQueryHead: hidden_dim must be a multiple of 4, for sines and cosines along two axes, got "
                f"{hidden_dim=}; pass {max(4, hidden_dim // 4 * 4)}"
            )
        check_divisor("ClassQueryHead", "num_heads", num_heads, hidden_dim, f"hidden_dim={hidden_dim}")
        if enc_layers < 0 or dec_layers < 1 or mlp_dim < 1:
            raise ValueError(
                f"ClassQueryHead: expected 0 or more enc_layers, 1 or more dec_layers and mlp_dim, got {enc_layers=}, "
                f"{dec_layers=}, {mlp_dim=}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"ClassQueryHead: dropout must be from 0 to below 1, got {dropout=}; leave it out for 0.1")
        super().__init__(num_classes, pool_type, drop_rate)
        self.in_features, self.channels = hidden_dim, in_features
        self.input_proj = nn.Linear(in_features, hidden_dim)
        self.positions = SinePositions(hidden_dim) if position == "sine" else LearnedPositions(hidden_dim)
        make = _layer(hidden_dim, num_heads, mlp_dim, dropout, pre_norm)
        self.encoder = nn.ModuleList(make(False) for _ in range(enc_layers))
        self.decoder = nn.ModuleList(make(True) for _ in range(dec_layers))
        self.encoder_norm = nn.LayerNorm(hidden_dim) if pre_norm else nn.Identity()
        self.norm = nn.LayerNorm(hidden_dim)
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.presence = nn.Linear(hidden_dim, 1)
        self.make_classifier()

    def make_classifier(self) -> None:
        """Make the class queries anew: the rows of `fc.weight`, where others' classifiers have the classes, too."""
        self.fc: nn.Module = nn.Identity()
        if self.num_classes:
            self.fc = nn.Embedding(self.num_classes, self.in_features)  # it is never called: no adapter may change it

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the encoder's output [B, H·W, d]."""
        size = x.shape[2:]
        x = self.input_proj(x.flatten(2).mT)
        positions = self.positions(x, size)
        for layer in self.encoder:
            x = layer(x, positions)
        return self.encoder_norm(x)

    def decode(self, memory: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """Return the class vectors [B, K, d] of the encoder's output; `seen` gets each layer's [B, G, K, N]."""
        query: Tensor = self.fc.weight  # type: ignore[assignment]
        x = torch.zeros_like(query).expand(memory.shape[0], -1, -1)
        for layer in self.decoder:
            x = layer(x, query, memory, seen)
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, d]."""
        return self.encode(x).mean(1)

    def classify(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, K]."""
        return self.presence(self.drop(self.decode(self.encode(x)))).squeeze(2)

    def attention(self, x: Tensor) -> Tensor:
        """Return how much each class sees of each place of a map [B, C, H, W], by layer and head: [L, B, G, K, H, W].

        The last layer's mean over the heads, `attention(x)[-1].mean(1)`, is what the paper draws, beside single heads.

        Raises:
            ValueError: if there are no classes.
        """
        if not self.num_classes:
            raise ValueError("ClassQueryHead: there are no classes whose attention could be shown; set num_classes")
        self.check_inputs("B C H W", x, C=self.channels)
        seen: list[Tensor] = []
        self.decode(self.encode(x), seen)
        return torch.stack(seen).unflatten(4, x.shape[2:])


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention where there is a memory, and MLP (ReLU), each with residual and norm (DETR's).

    Args:
        dim: channels d.
        num_heads: heads G.
        mlp_dim: hidden width of the MLP.
        dropout: dropout probability of attention, of the MLP and of each branch.
        pre_norm: normalize before each branch, not after each sum.
        cross: have the cross-attention.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float, pre_norm: bool, cross: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True) if cross else None
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3 if cross else 2))
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, position: Tensor, memory: Tensor | None = None, seen: list[Tensor] | None = None
    ) -> Tensor:
        """[B, N, d] to [B, N, d].

        Args:
            x: tokens.
            position: added to queries and keys of the tokens, not to values; broadcast to x.
            memory: what cross-attention sees, [B, M, d].
            seen: gets the weights of the cross-attention, [B, G, N, M].
        """

        def among(y: Tensor) -> Tensor:
            return self.self_attn(y + position, y + position, y, need_weights=False)[0]

        def across(y: Tensor) -> Tensor:
            assert self.cross_attn is not None
            out, weights = self.cross_attn(
                y + position, memory, memory, need_weights=seen is not None, average_attn_weights=False
            )
            if seen is not None:
                seen.append(weights)
            return out

        branches: tuple[Callable[[Tensor], Tensor], ...] = (among, self.mlp)
        if self.cross_attn is not None:
            branches = (among, across, self.mlp)
        for branch, norm in zip(branches, self.norms, strict=True):
            x = x + self.drop(branch(norm(x))) if self.pre_norm else norm(x + self.drop(branch(x)))
        return x


def _layer(dim: int, num_heads: int, mlp_dim: int, dropout: float, pre_norm: bool) -> Callable[[bool], DecoderLayer]:
    return lambda cross: DecoderLayer(dim, num_heads, mlp_dim, dropout, pre_norm, cross)


class SinePositions(nn.Module):
    """Sines and cosines of the places along both axes, each of which is 2π long, y before x (DETR's).

    Args:
        dim: channels d, half of them for each axis.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    @one_node  # it looks at the size of the map
    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return [H·W, d] for a map of H x W in x's dtype and on its device."""
        wide = torch.promote_types(x.dtype, torch.float32)
        half = self.dim // 2
        pair = torch.arange(half, device=x.device) // 2
        lengths = 10_000 ** (2 * pair.to(wide) / half)
        waves = []
        for count in size:
            place = torch.arange(1, count + 1, device=x.device, dtype=wide)
            angles = (place / (count + 1e-6) * 2 * math.pi)[:, None] / lengths
            waves.append(torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 2).flatten(1))
        rows, columns = waves
        rows, columns = rows[:, None].expand(-1, size[1], -1), columns[None].expand(size[0], -1, -1)
        return torch.cat([rows, columns], 2).flatten(0, 1).to(x.dtype)


class LearnedPositions(nn.Module):
    """A learned vector for each column and each row, x before y (DETR's).

    Args:
        dim: channels d, half of them for each axis.
    """

    NO_WEIGHT_DECAY = ("rows", "columns")

    def __init__(self, dim: int):
        super().__init__()
        self.rows, self.columns = (nn.Parameter(torch.rand(LONGEST, dim // 2)) for _ in range(2))

    @one_node  # it looks at the size of the map
    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return [H·W, d] for a map of H x W.

        Raises:
            ValueError: if a side is longer than 50.
        """
        if max(size) > LONGEST:
            raise ValueError(
                f"ClassQueryHead: position='learned' takes maps of {LONGEST} x {LONGEST} at most, got "
                f"{size[0]} x {size[1]}; give smaller images, or position='sine'"
            )
        rows, columns = self.rows[: size[0], None], self.columns[None, : size[1]]
        return torch.cat([columns.expand(size[0], -1, -1), rows.expand(-1, size[1], -1)], 2).flatten(0, 1).to(x.dtype)
