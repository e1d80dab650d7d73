"""Routed attention: the tokens of a region attend to the tokens of a list of regions."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.regions import check_regions, check_valid_size
from visionzoo.kernels.routed_attention import reference


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    *,
    regions: int | tuple[int, int],
    scale: float | None = None,
    valid_size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head softmax attention in which the query's region says which regions its keys come from.

    Args:
        q: queries [B, H, W, G, D].
        k: keys, like q.
        v: values, like q.
        index: int64 [B, R, K], for each of the R regions (numbered row by row) the K regions it attends to; a region
            named twice counts twice. None: each region attends to itself, which is window attention.
        regions: regions per side, or (vertical, horizontal); they must divide H and W.
        scale: of the scores; None means D^-½.
        valid_size: (height, width) of the map without its padding at the bottom and right; padded keys are then left
            out. Every query's list needs one region that is not padding alone, as `route_regions` ensures; queries
            in regions of padding give 0. None: every token counts.
        backend: "auto", "reference" or "triton".

    Returns:
        [B, H, W, G, D] in q's dtype; scores and softmax are float32 at least.

    Raises:
        ValueError: if shapes, dtypes, regions, index or backend are not as said.
    """
    regions = check_regions("routed_attention", q, k, regions)
    check_valid_size("routed_attention", q, valid_size)
    if v.shape != q.shape or v.dtype != q.dtype or v.device != q.device:
        raise ValueError(
            f"routed_attention: v must be like q {tuple(q.shape)} {q.dtype} on {q.device}, "
            f"got {tuple(v.shape)} {v.dtype} on {v.device}"
        )
    if index is not None:
        _check_index(index, q, regions[0] * regions[1])
    choose("routed_attention", backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.forward(q, k, v, index, regions=regions, scale=scale, valid_size=valid_size)


def _check_index(index: Tensor, q: Tensor, count: int) -> None:
    if index.ndim != 3 or index.shape[0] != q.shape[0] or index.shape[1] != count or index.shape[2] < 1:
        raise ValueError(
            f"routed_attention: index must be [B, R, K] = [{q.shape[0]}, {count}, K ≥ 1], got {tuple(index.shape)}"
        )
    if index.is_floating_point() or index.is_complex() or index.device != q.device:
        raise ValueError(
            f"routed_attention: index must hold integers on {q.device}, got {index.dtype} on {index.device}"
        )
    if index.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the look would cost a wait
        low, high = index.aminmax()
        if low < 0 or high >= count:
            raise ValueError(f"routed_attention: index must name regions 0 to {count - 1}, got {low} to {high}")
