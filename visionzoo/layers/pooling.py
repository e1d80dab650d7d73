"""Means over the cells of a map, whose number need not divide the map's sides."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.layers.tracing import one_node


def cells(length: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cut `length` places into `count` cells, which may overlap by one: first place and end of each, [count].

    They are those of torch's adaptive pooling.
    """
    index = torch.arange(count, device=device)
    return index * length // count, ((index + 1) * length + count - 1) // count


@one_node
def pool_cells(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean of each cell of a [B, H, W, C] map, for (h, w) = `size` cells: [B, h, w, C].

    It is `F.adaptive_avg_pool2d` as two matrix products, so that gradients repeat on a GPU.

    Raises:
        ValueError: if x is no map, or there are no cells.
    """
    checked = isinstance(x, Tensor) and not torch.compiler.is_compiling()  # and not traced
    if checked and (x.ndim != 4 or min(*x.shape[1:3], *size) < 1):
        raise ValueError(
            f"pool_cells: expected a map [B, H, W, C] and sizes of 1 or more, got {tuple(x.shape)} and {size=}"
        )
    rows, columns = (_shares(x, axis, count) for axis, count in ((1, size[0]), (2, size[1])))
    return columns @ (rows @ x.flatten(2)).unflatten(2, (x.shape[2], x.shape[3]))


def _shares(x: Tensor, axis: int, count: int) -> Tensor:
    first, end = (edge[:, None] for edge in cells(x.shape[axis], count, x.device))
    place = torch.arange(x.shape[axis], device=x.device)
    return ((place >= first) & (place < end)).to(x.dtype) / (end - first).to(x.dtype)
