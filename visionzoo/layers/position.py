"""Learned tables of positions, absolute and relative, and positions from the map itself, for maps of any size.

`fit_weight` of a table turns the one of a checkpoint, which may be of another size, into its own;
`visionzoo.load_weights` calls it.
"""

from __future__ import annotations

from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from visionzoo.kernels import depthwise_conv
from visionzoo.layers.arguments import Positive
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.part import Part
from visionzoo.layers.pooling import cells as cells_of
from visionzoo.layers.tracing import one_node

Mode = Literal["bilinear", "bicubic"]  # of interpolation


class PositionTable(Part):
    """A learned vector for each position of a map, added to it; interpolated to maps of other sizes.

    Args:
        dim: channels C.
        size: height and width of the table.
        std: of the truncated normal distribution it starts from; 0 for zeros.
        mode: of the interpolation, "bilinear" or "bicubic".
    """

    def __init__(
        self,
        dim: Positive,
        size: int | tuple[int, int],
        *,
        std: float = 0.02,
        mode: Mode = "bilinear",
    ):
        super().__init__()
        height, width = to_2tuple(size)
        if height < 1 or width < 1:
            raise ValueError(f"PositionTable: size must be positive, got {size=}")
        self.mode = mode
        self.table = nn.Parameter(torch.zeros(1, height, width, dim))
        if std:
            trunc_normal_(self.table, std=std)

    @one_node  # it looks at the size of the map
    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C], in x's dtype."""
        self.check_inputs("B H W C", x, any_dtype=True, C=self.table.shape[3])
        return x + resize_table(self.table, x.shape[1:3], self.mode).to(x.dtype)

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's table, [1, N, C] of a square map or [1, h, w, C], to the size of ours.

        The position of a class token before those of the map, if there is one, is left out.
        """
        if weight.ndim == 3:
            side = isqrt(weight.shape[1])
            class_tokens = weight.shape[1] - side * side
            if class_tokens > 1:
                raise ValueError(f"{name}: expected the positions of a square map, got {tuple(weight.shape)}")
            weight = weight[:, class_tokens:].unflatten(1, (side, side))
        return resize_table(weight, self.table.shape[1:3], self.mode)


class PositionGenerator(DepthwiseConvNHWC):
    """Positions that are read from the map (PEG of CPVT, arXiv:2102.10882): a depthwise convolution, added to the map.

    Tokens learn where they are from the zeros around the map, whatever its size. `visionzoo.models._positions` puts it
    into the blocks of any model.

    Args:
        dim: channels C.
        kernel_size: side of the kernels, odd.

    Raises:
        ValueError: if the kernel is even or not positive.

    >>> PositionGenerator(8)(torch.zeros(2, 5, 7, 8)).shape
    torch.Size([2, 5, 7, 8])
    """

    NO_WEIGHT_DECAY = ("weight",)

    def __init__(self, dim: int, kernel_size: int = 3):
        super().__init__(dim, kernel_size)

    def reset_parameters(self) -> None:
        """Draw initial values as released: normal with variance 2 / kernel_size², no bias."""
        nn.init.normal_(self.weight, std=2**0.5 / self.kernel_size)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @one_node  # as torch's own layers are
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, H, W, C] to [B, H, W, C]."""
        return depthwise_conv(x, self.weight, self.bias, residual=x)


class RelativePositionBias(Part):
    """A learned number for each offset between two tokens of a window, for each head (Swin, arXiv:2103.14030).

    Args:
        num_heads: heads G.
        size: height h and width w of the windows.
    """

    NO_WEIGHT_DECAY = ("table",)
    bias: Tensor | None

    def __init__(self, num_heads: Positive, size: Positive | tuple[Positive, Positive]):
        super().__init__()
        self.size: tuple[int, int] = to_2tuple(size)
        # offset (query - key) counted row by row from (1 - h, 1 - w), as in the authors' checkpoints
        self.table = nn.Parameter(torch.zeros((2 * self.size[0] - 1) * (2 * self.size[1] - 1), num_heads))
        self.register_buffer("bias", None)  # see `precompute`
        trunc_normal_(self.table, std=0.02)

    @torch.no_grad()
    def precompute(self) -> None:
        """Keep the bias, for inference with these weights (`visionzoo.fuse`)."""
        self.bias = self()

    def forward(self) -> Tensor:
        """Bias [G, n, n] of n = h·w queries and as many keys, both numbered row by row."""
        if self.bias is not None:
            return self.bias
        height, width = self.size
        # Along each axis the biases of one query are a stretch of the table, which moves on by one with the query.
        offsets = self.table.unflatten(0, (2 * height - 1, 2 * width - 1))
        bias = offsets.unfold(0, height, 1).unfold(1, width, 1).flip(-2, -1)  # [h, w, G, h, w]
        return bias.permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2)

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's table [(2h' - 1)², G], of square windows, to the size of ours."""
        side = isqrt(weight.shape[0])
        if side * side != weight.shape[0]:
            raise ValueError(f"{name}: expected the offsets in a square window, got {tuple(weight.shape)}")
        offsets = weight.unflatten(0, (side, side))[None]
        size = (2 * self.size[0] - 1, 2 * self.size[1] - 1)
        return resize_table(offsets, size, "bicubic").flatten(0, 2)


class NeighborhoodBias(Part):
    """A learned number for each offset from a query to its neighbors, for each head (NAT, arXiv:2204.07143).

    Args:
        num_heads: heads G.
        kernel_size: (vertical, horizontal); the table is [G, 2·vertical - 1, 2·horizontal - 1].
    """

    NO_WEIGHT_DECAY = ("table",)

    def __init__(self, num_heads: Positive, kernel_size: tuple[Positive, Positive]):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1))
        trunc_normal_(self.table, std=0.02)

    def forward(self) -> Tensor:
        """Return the table, as a copy: what keeps parameters elsewhere may take ours away after this."""
        return self.table.clone()

    def fit_weight(self, name: str, weight: Tensor) -> Tensor:
        """Bring a checkpoint's table, of another kernel size, to the size of ours, bicubically as the authors did."""
        if weight.ndim != 3:
            raise ValueError(f"{name}: expected the offsets of a neighborhood [G, h, w], got {tuple(weight.shape)}")
        return resize_table(weight.permute(1, 2, 0)[None], self.table.shape[1:], "bicubic")[0].permute(2, 0, 1)


class ContinuousPositionBias(Part):
    """A bias for each offset between query and key and each head, which an MLP computes (TransNeXt, arXiv:2311.17132).

    Keys are the tokens of a map, or cells of it, whose places are their centers. The MLP sees the offset along each
    axis, sign(d)·log2(1 + |d|) / 3 with d = 8 for the longest one of a map of `unit` size; maps may have any size.

    Args:
        num_heads: heads G.
        hidden_dim: channels of the MLP between its layers.
    """

    NO_WEIGHT_DECAY = ("fc1.weight", "fc2.weight")

    def __init__(self, num_heads: Positive, hidden_dim: Positive = 512):
        super().__init__()
        self.fc1 = nn.Linear(2, hidden_dim)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden_dim, num_heads)

    def forward(self, size: tuple[int, int], cells: tuple[int, int], unit: tuple[int, int], x: Tensor) -> Tensor:
        """Bias [G, H·W, h·w] of the tokens of a map x of (H, W) = `size` and of its (h, w) = `cells` cells.

        The MLP runs once for each offset, not for each pair.
        """
        axes = [self._offsets(*lengths, x.device) for lengths in zip(size, cells, unit, strict=True)]
        (rows, at_row), (columns, at_column) = axes
        offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        table = self.fc2(self.act(self.fc1(offsets.to(x.dtype)))).permute(2, 0, 1)
        bias = table.index_select(1, at_row.flatten()).index_select(2, at_column.flatten())  # [G, H·h, W·w]
        bias = bias.unflatten(2, at_column.shape).unflatten(1, at_row.shape)
        return bias.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _offsets(self, length: int, count: int, unit: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Offsets along an axis as the MLP sees them, and which of them each query [length] has to each key [count]."""
        first, end = cells_of(length, count, device)
        twice = 2 * torch.arange(length, device=device)[:, None] - (first + end - 1)  # in half tokens
        # Where the cells divide the map all their centers are whole tokens apart: half of the offsets do not occur.
        whole = length % count == 0
        step, longest = (2, 2 * length - length // count - 1) if whole else (1, 2 * length - 2)
        distance = torch.arange(-longest, longest + 1, step, device=device).float() / 2  # as released, in float32
        distance = distance / (unit - 1 if isinstance(unit, torch.SymInt) else max(unit - 1, 1)) * 8
        seen = torch.sign(distance) * torch.log2(distance.abs() + 1) / 3
        return seen, (twice + longest) // step


@one_node
def resize_table(
    table: Tensor, size: tuple[int, int] | torch.Size, mode: str, *, align_corners: bool = False
) -> Tensor:
    """Interpolate [1, h, w, C] to [1, H, W, C] with (H, W) = `size`, in float32 at least; the same table if it fits."""
    if not isinstance(size[0], torch.SymInt) and table.shape[1:3] == tuple(size):
        return table
    accumulate = torch.promote_types(table.dtype, torch.float32)
    table_nchw = table.permute(0, 3, 1, 2).to(accumulate)
    out = F.interpolate(table_nchw, size=tuple(size), mode=mode, align_corners=align_corners)
    return out.permute(0, 2, 3, 1).to(table.dtype)


def places_of(source: Tensor, tokens: int) -> Tensor:
    """Return where on the map each of the tokens is, [B, M], from `source` [B, N]; padding is at the first place."""
    at = torch.arange(source.shape[1], device=source.device).expand_as(source)
    found = source.new_zeros(source.shape[0], tokens + 1)
    return found.scatter(1, torch.where(source >= 0, source, tokens), at)[:, :tokens]
