"""Routing of regions to regions, the first level of bi-level routing attention (BiFormer, arXiv:2303.08810)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visionzoo.kernels.checks import check_qkv
from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.region_routing import reference
from visionzoo.kernels.regions import check_grid, check_valid_size

MAX_REGIONS = 1024  # of the Triton kernels: a region's scores with all others are held at once


def route_regions(
    q: Tensor,
    k: Tensor,
    *,
    regions: int | tuple[int, int],
    topk: int,
    scale: float | None = None,
    valid_size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """For each region the `topk` regions with the largest scale·(mean query · mean key) over all heads, best first.

    Ties go to the lower region number. No gradient flows through the choice.

    Args:
        q: queries [B, H, W, G, D].
        k: keys, like q.
        regions: regions per side, or (vertical, horizontal); they must divide H and W.
        topk: from 1 to the number of regions R.
        scale: of the scores; None means (G·D)^-½. It does not change the choice unless it is negative.
        valid_size: (height, width) of the map without its padding at the bottom and right; padded tokens are then
            left out of the means, and regions of only padding come last. None: every token counts.
        backend: "auto", "reference" or "triton".

    Returns:
        int64 [B, R, topk], region numbers row by row.

    Raises:
        ValueError: if shapes, dtypes, regions, topk or backend are not as described.
    """
    check_qkv("route_regions", q, k)
    regions = check_grid("route_regions", regions, (q.shape[1], q.shape[2]))
    check_valid_size("route_regions", q, valid_size)
    if not 1 <= topk <= regions[0] * regions[1]:
        raise ValueError(f"route_regions: topk must be from 1 to {regions[0] * regions[1]} regions, got {topk=}")
    arguments: dict[str, Any] = {
        "regions": regions,
        "topk": topk,
        "scale": (q.shape[3] * q.shape[4]) ** -0.5 if scale is None else scale,
        "valid_size": valid_size,
    }
    count = regions[0] * regions[1]
    unsupported = f"its kernels take up to {MAX_REGIONS} regions, got {count}" if count > MAX_REGIONS else None
    if choose("route_regions", backend, q, unsupported=unsupported) == "triton":
        from visionzoo.kernels.region_routing import triton

        return triton.forward(q, k, **arguments)
    return reference.forward(q, k, **arguments)
