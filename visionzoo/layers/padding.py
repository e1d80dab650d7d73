"""Padding of [B, H, W, C] maps to sizes that regions, windows and strides divide, or that neighborhoods fit into."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzoo.kernels.regions import cut, is_symbolic
from visionzoo.layers.tracing import one_node


@one_node
def pad_to_multiple(x: Tensor, multiple: tuple[int, int], both_sides: bool = False, at_start: bool = False) -> Tensor:
    """Add zeros at the bottom and right of a [B, H, W, C] map until `multiple` (height, width) divides it.

    With `both_sides` half of them, rounded down, come at the top and left; with `at_start` all do.
    """
    # Written with the quotients, which the regions' sizes are, so that symbolic sizes simplify.
    height, width = x.shape[1], x.shape[2]
    bottom = (height + multiple[0] - 1) // multiple[0] * multiple[0] - height
    right = (width + multiple[1] - 1) // multiple[1] * multiple[1] - width
    # Under torch.compile a test on symbolic sizes would cost a recompilation; padding by nothing costs nothing there.
    if torch.compiler.is_compiling() or bottom or right:
        top, left = (bottom // 2, right // 2) if both_sides else (bottom, right) if at_start else (0, 0)
        x = F.pad(x, (0, 0, left, right - left, top, bottom - top))
    return x


@one_node
def crop(x: Tensor, size: tuple[int, int] | torch.Size, both_sides: bool = False, at_start: bool = False) -> Tensor:
    """Take off what `pad_to_multiple`, called alike, has added to a [B, H, W, C] map of (height, width) = `size`."""
    bottom, right = x.shape[1] - size[0], x.shape[2] - size[1]
    top, left = (bottom // 2, right // 2) if both_sides else (bottom, right) if at_start else (0, 0)
    return cut(x, (top, left), size)


@one_node
def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut a map [B, H, W, C], of whole windows of h rows and w columns, into these: [B·H/h·W/w, h, w, C]."""
    rows, columns = x.shape[1] // window[0], x.shape[2] // window[1]
    return x.unflatten(2, (columns, window[1])).unflatten(1, (rows, window[0])).transpose(2, 3).flatten(0, 2)


@one_node
def from_windows(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Join windows [B·H/h·W/w, h, w, C] to the map [B, H, W, C] that they were cut from; `size` is (H, W)."""
    rows, columns = size[0] // x.shape[1], size[1] // x.shape[2]
    return x.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


@one_node
def pad_to_size(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Add zeros at the bottom and right of a [B, H, W, C] map until it is at least `size` (height, width)."""
    if is_symbolic(x):
        missing: Any = [torch.sym_max(0, size[axis] - x.shape[1 + axis]) for axis in (0, 1)]
        bottom, right = missing
        return F.pad(x, (0, 0, 0, right, 0, bottom))
    bottom, right = max(0, size[0] - x.shape[1]), max(0, size[1] - x.shape[2])
    # Under torch.compile this test makes a graph of its own for maps that are too small; others shall not pay for it.
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def neighbors(x: Tensor) -> list[Tensor]:
    """Nine maps like [B, H, W, C]: at each place what stands at the 3×3 around it, row by row, with zeros around x.

    They are views of one copy.
    """
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    return [padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]] for dy in range(3) for dx in range(3)]


def windows(x: Tensor, side: int) -> Tensor:
    """[B, H, W, C] to [B, H, W, C, side, side]: the odd window around each place, with zeros around x.

    It is a view of one copy.
    """
    return F.pad(x, (0, 0, *[side // 2] * 4)).unfold(1, side, 1).unfold(2, side, 1)
