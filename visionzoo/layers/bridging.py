"""Attention from the pixels of detectors' maps to key points: bridging visual representations, arXiv:2010.15831.

RelationNet++, NeurIPS 2020. Facts from code/models/utils/bvr_transformer of
https://github.com/microsoft/RelationNet2 at 0930752 (MIT license); the code here is our own. The authors pass the
sines of all (base + 1)² offsets through a 1×1 convolution; as the first half of them depends on x only and the second
on y, here each axis is projected by itself, and the table is the sum of both, which is the same. So the sines are no
tensor of checkpoints here (165 MB at a base of 400); those of the authors' checkpoints are skipped. As in their code,
offsets beyond the table take its border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.arguments import Positive
from visionzoo.layers.part import Part
from visionzoo.layers.tracing import one_node


class RelativeLocation(Part):
    """A score for each head from the offset between two locations: a linear map of its sines and cosines, then a log.

    With `base_size` the scores are computed once at whole offsets, and interpolated.

    Args:
        dim: sines and cosines, a multiple of 4: half of them of x, half of y.
        num_heads: heads G.
        base_size: width and height of the table of offsets; None to compute each offset's.
        log_scale: take the logarithm of the scores, which are 1e-6 at least.
        temperature: the frequencies fall from 1 to nearly 1 / `temperature`.

    Raises:
        ValueError: if `dim` is no multiple of 4, or a size is below 2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: Positive,
        *,
        base_size: Sequence[int] | None = (300, 300),
        log_scale: bool = False,
        temperature: float = 1000.0,
    ):
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"RelativeLocation: dim must be a positive multiple of 4, got {dim=}")
        if base_size is not None and (len(base_size) != 2 or min(base_size) < 2):
            raise ValueError(
                f"RelativeLocation: base_size must be width and height of the table, 2 or more, got {base_size=}"
            )
        if temperature <= 0:
            raise ValueError(f"RelativeLocation: temperature must be positive, got {temperature=}")
        self.dim, self.base_size, self.log_scale, self.temperature = dim, base_size, log_scale, temperature
        self.embedding_transform = nn.Sequential(nn.ModuleDict({"conv": nn.Conv2d(dim, num_heads, 1)}))
        nn.init.normal_(self._projection.weight, std=0.01)
        nn.init.zeros_(self._projection.bias)  # type: ignore[arg-type]
        self.register_load_state_dict_pre_hook(_skip_sines)

    @property
    def _projection(self) -> nn.Conv2d:
        projection: Any = self.embedding_transform[0]["conv"]  # type: ignore[index]
        return projection

    def table(self) -> Tensor | None:
        """Return the scores of whole offsets [1, G, height, width], for `forward`; None without `base_size`."""
        if self.base_size is None:
            return None
        device = self._projection.weight.device
        with without_autocast(device):
            width, height = (
                self._axis(torch.arange(-(n // 2), n // 2 + 1, device=device), i) for i, n in enumerate(self.base_size)
            )
            scores = self._with_bias(width[None] + height[:, None])
        return scores.permute(2, 0, 1)[None]

    @one_node  # it looks at shapes
    def forward(self, offsets: Tensor, table: Tensor | None = None) -> Tensor:
        """Offsets [B, Q, K, 2], as (x, y), to scores [B, G, Q, K], float32 at least.

        `table` is that of `table()`, if it is at hand.
        """
        self.check_inputs("B Q K 2", offsets, any_dtype=True)
        with without_autocast(offsets.device):
            if self.base_size is None:
                x, y = (self._axis(offsets[..., i], i) for i in range(2))
                scores = self._with_bias(x + y).permute(0, 3, 1, 2)
            else:
                table = self.table() if table is None else table
                sides = zip(offsets.to(table.dtype).unbind(-1), self.base_size, strict=True)  # type: ignore[union-attr]
                places = torch.stack([2 * offset / side for offset, side in sides], -1)
                scores = F.grid_sample(
                    table.expand(offsets.shape[0], -1, -1, -1),  # type: ignore[union-attr]
                    places,
                    padding_mode="border",
                    align_corners=False,
                )
            return scores.clamp(min=1e-6).log() if self.log_scale else scores

    def _with_bias(self, scores: Tensor) -> Tensor:
        bias: Any = self._projection.bias
        return scores + bias

    def _axis(self, offsets: Tensor, axis: int) -> Tensor:
        """Offsets [...] along x (0) or y (1) to their part of the scores, [..., G]."""
        weight = self._projection.weight.flatten(1)[:, axis * self.dim // 2 : (axis + 1) * self.dim // 2]
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        powers = 4 / self.dim * torch.arange(self.dim // 4, device=weight.device)
        angles = offsets.to(weight)[..., None] / self.temperature ** powers.to(weight.dtype)
        return torch.cat([angles.sin(), angles.cos()], -1) @ weight.mT


def _skip_sines(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}base_embedding", None)


class BridgingAttention(Part):
    """Let the pixels of maps attend to key points, of one kind or several; O(kinds·N·K·C) for K points of each.

    The scores are those of multi-head attention, plus one for each head from the point's location as seen from the
    pixel. What the kinds of points give is added to the pixel, and passes a ReLU. Softmax, locations and their scores
    are float32 at least, the rest has the dtype of the input or of autocast.

    Args:
        dim: channels C.
        num_heads: heads.
        num_kinds: kinds of key points, with an attention each.
        location: options of `RelativeLocation`; None to leave locations out.
        appearance: compare pixels with key points by their features; without, only by location.
        shared_location: one `RelativeLocation` for all kinds.
        location_of: that of another layer, which is used instead of an own one.
        cat_offset: join what a pixel gets with the mean offset of the points that it looks at, by a linear layer and a
            ReLU.

    Raises:
        ValueError: if the heads do not divide the channels, there is no kind, or points are compared by nothing.

    >>> layer = BridgingAttention(32, 4, num_kinds=1)
    >>> pixels, points = torch.zeros(1, 6, 8, 32), torch.zeros(1, 5, 32)
    >>> layer([pixels], [torch.zeros(1, 6, 8, 2)], [[points]], [[torch.zeros(1, 5, 2)]])[0].shape
    torch.Size([1, 6, 8, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kinds: int = 1,
        location: dict[str, Any] | None = {},  # noqa: B006  never changed
        appearance: bool = True,
        shared_location: bool = True,
        location_of: BridgingAttention | None = None,
        cat_offset: bool = False,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"BridgingAttention: num_heads must divide dim, got {dim=} and {num_heads=}")
        if num_kinds < 1:
            raise ValueError(f"BridgingAttention: expected one kind of key points or more, got {num_kinds=}")
        if location is None and not appearance:
            raise ValueError("BridgingAttention: points are compared by nothing; pass location or appearance=True")
        if location_of is not None and not isinstance(location_of.relative_positional_encoding, RelativeLocation):
            raise ValueError("BridgingAttention: location_of must be a layer whose kinds share their location")
        self.dim, self.num_heads, self.appearance = dim, num_heads, appearance
        self.relative_positional_encoding: RelativeLocation | nn.ModuleList | None
        self.decoder = nn.ModuleList(nn.MultiheadAttention(dim, num_heads) for _ in range(num_kinds))
        if location is None:
            self.relative_positional_encoding = None
        elif location_of is not None:
            self.relative_positional_encoding = location_of.relative_positional_encoding
        elif shared_location:
            self.relative_positional_encoding = RelativeLocation(dim, num_heads, **location)
        else:
            self.relative_positional_encoding = nn.ModuleList(
                RelativeLocation(dim, num_heads, **location) for _ in range(num_kinds)
            )
        if cat_offset:
            self.embed_trans = nn.Sequential(nn.Linear(dim + 2 * num_kinds, dim), nn.ReLU())
            self.pos_trans = nn.Linear(2, 2, bias=False)
            nn.init.normal_(self.embed_trans[0].weight, std=0.01)  # type: ignore[arg-type]
        self.cat_offset = cat_offset

    @one_node  # it looks at shapes
    def forward(
        self,
        pixels: Sequence[Tensor],
        places: Sequence[Tensor],
        points: Sequence[Sequence[Tensor]],
        point_places: Sequence[Sequence[Tensor]],
        units: Sequence[float] | None = None,
    ) -> list[Tensor]:
        """Return the pixels of each level, [B, H, W, C].

        Args:
            pixels: levels [B, H, W, C].
            places: of the pixels, [B, H, W, 2], as (x, y).
            points: of each level, of each kind: [B, K, C].
            point_places: of each level, of each kind: [B, K, 2].
            units: lengths in which each level's places are measured; None for 1.

        Raises:
            ValueError: if a level has other kinds of points, or a tensor is not such.
        """
        for kinds in points:
            if len(kinds) != len(self.decoder):
                raise ValueError(
                    f"BridgingAttention: expected {len(self.decoder)} kinds of points on each level, got {len(kinds)}"
                )
        for x, xy, kinds, kinds_xy in zip(pixels, places, points, point_places, strict=True):
            self.check_inputs("B H W C, B H W 2", x, xy, any_dtype=True, C=self.dim)
            for kind, kind_xy in zip(kinds, kinds_xy, strict=True):
                self.check_inputs("B K C, B K 2", kind, kind_xy, any_dtype=True, B=x.shape[0], C=self.dim)
        locations = self.relative_positional_encoding
        each = list(locations) if isinstance(locations, nn.ModuleList) else [locations] * len(self.decoder)
        tables = {id(one): one.table() for one in each if one is not None}  # type: ignore[operator]
        levels = zip(pixels, places, points, point_places, units or [1.0] * len(pixels), strict=True)
        return [
            self._level(x, xy / unit, kinds, [other / unit for other in kinds_xy], each, tables)
            for x, xy, kinds, kinds_xy, unit in levels
        ]

    def _level(
        self, pixels: Tensor, places: Tensor, points: Any, point_places: Any, each: list[Any], tables: dict[int, Any]
    ) -> Tensor:
        x, xy = pixels.flatten(1, 2), places.flatten(1, 2)
        found, means = [], []
        for attention, kind, kind_xy, location in zip(self.decoder, points, point_places, each, strict=True):
            dtype = torch.promote_types(xy.dtype, torch.float32)
            offsets = kind_xy.to(dtype)[:, None] - xy.to(dtype)[:, :, None]
            scores = None if location is None else location(offsets, tables[id(location)])
            gathered, weights = self._attend(attention, x, kind, scores)
            found.append(gathered)
            if self.cat_offset:
                mean = (weights.mean(1)[..., None] * offsets.detach()).sum(2)
                means.append(self.pos_trans(mean.to(x.dtype)))
        x = F.relu(x + sum(found))
        if self.cat_offset:
            x = self.embed_trans(torch.cat([x, *means], -1))
        return x.view(pixels.shape)

    def _attend(self, attention: Any, x: Tensor, points: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what pixels [B, N, C] gather of points [B, K, C], and the weights [B, G, N, K]."""
        to_q, to_k, to_v = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        if self.appearance:
            q, k = (F.linear(t, *to).unflatten(-1, (self.num_heads, -1)) for t, to in ((x, to_q), (points, to_k)))
            alike = torch.einsum("bngd,bkgd->bgnk", q * q.shape[-1] ** -0.5, k)
            scores = alike if scores is None else alike + scores
        v = F.linear(points, *to_v).unflatten(-1, (self.num_heads, -1))
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)  # type: ignore[union-attr]
        gathered = torch.einsum("bgnk,bkgd->bngd", weights.to(v.dtype), v)
        return attention.out_proj(gathered.flatten(2)), weights
