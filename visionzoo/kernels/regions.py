"""Regions: the grid of equal rectangles that routed and window attention cut a map into, numbered row by row; crops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_grid(operation: str, regions: tuple[int, int] | int, size: tuple[int, int]) -> tuple[int, int]:
    """Return `regions` per side as (vertical, horizontal) after checking that they divide a map of (height, width).

    Raises:
        ValueError: if they do not.
    """
    rows, columns = (regions, regions) if isinstance(regions, int) else regions
    if rows < 1 or columns < 1 or size[0] % rows or size[1] % columns:
        raise ValueError(
            f"{operation}: regions must be positive and divide the map, got regions={(rows, columns)} for height "
            f"{size[0]} and width {size[1]}; pad the map first (visionzoo.layers.padding.pad_to_multiple)"
        )
    return rows, columns


def check_valid_size(operation: str, q: Tensor, valid_size: tuple[int, int] | None) -> None:
    """Check that `valid_size`, the unpadded (height, width), fits the map of q [B, H, W, G, D].

    Raises:
        ValueError: if it does not.
    """
    if valid_size is not None and not (0 < valid_size[0] <= q.shape[1] and 0 < valid_size[1] <= q.shape[2]):
        raise ValueError(
            f"{operation}: valid_size must lie within the map {tuple(q.shape[1:3])} and be positive, got {valid_size=}"
        )


def to_regions(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """[B, H, W, ...] to [B, R, n, ...]: the tokens of each region, both numbered row by row."""
    (rows, columns), (batch, height, width, *rest) = regions, x.shape
    tall, wide = height // rows, width // columns
    x = x.reshape(batch, rows, tall, columns, wide, *rest).transpose(2, 3)
    return x.reshape(batch, rows * columns, tall * wide, *rest)


def from_regions(x: Tensor, regions: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Undo `to_regions`: [B, R, n, ...] to [B, H, W, ...] with (H, W) = `size`."""
    (rows, columns), (batch, _, _, *rest) = regions, x.shape
    x = x.reshape(batch, rows, columns, size[0] // rows, size[1] // columns, *rest).transpose(2, 3)
    return x.reshape(batch, *size, *rest)


def valid_tokens(size: tuple[int, int], valid_size: tuple[int, int], regions: tuple[int, int], device) -> Tensor:
    """Which tokens of each region are not padding: bool [R, n]."""
    rows = torch.arange(size[0], device=device) < valid_size[0]
    columns = torch.arange(size[1], device=device) < valid_size[1]
    return to_regions((rows[:, None] & columns[None, :])[None], regions)[0]


def is_symbolic(x: Tensor) -> bool:
    """Whether torch.export is tracing a [B, H, W, ...] map of any size: no branch may ask how large it is."""
    return isinstance(x.shape[1], torch.SymInt) or isinstance(x.shape[2], torch.SymInt)


def cut(x: Tensor, start: tuple[int, int], size: tuple[int, int] | torch.Size) -> Tensor:
    """Cut the map of (height, width) = `size` that begins at (row, column) = `start` out of [B, H, W, ...]."""
    (top, left), (height, width) = start, size
    if is_symbolic(x):  # a slice would tie the exported program to sizes that need no padding, or to those that do
        bottom, right = top + height - x.shape[1], left + width - x.shape[2]
        return F.pad(x, (0, 0) * (x.ndim - 3) + (-left, right, -top, bottom))
    return x[:, top : top + height, left : left + width]
