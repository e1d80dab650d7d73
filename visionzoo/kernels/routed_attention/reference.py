"""Specification of routed attention, in plain torch; runs in any floating dtype and under autograd.

All is computed in float32 at least, from one rounding of the inputs to one of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.kernels.precision import without_autocast
from visionzoo.kernels.regions import from_regions, to_regions, valid_tokens


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    *,
    regions: tuple[int, int],
    scale: float,
    bias: Tensor | None,
    segments: Tensor | None,
    weights: Tensor | None,
    valid_size: tuple[int, int] | None,
) -> Tensor:
    """Attention of [B, H, W, G, D] tensors as `routed_attention` says; copies K and V once for each listed region."""
    size, dtype = (q.shape[1], q.shape[2]), q.dtype
    accumulate = torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(accumulate) for t in (q, k, v))
    q_regions, k_regions, v_regions = (to_regions(t, regions).transpose(2, 3) for t in (q, k, v))  # [B, R, G, n, D]
    if index is not None:
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
        # [B, R, K, G, n, D] -> [B, R, G, K·n, D]
        k_regions, v_regions = (t[batch, index] for t in (k_regions, v_regions))
        if weights is not None:
            k_regions, v_regions = (t * weights.to(t.dtype)[..., None, None, None] for t in (k_regions, v_regions))
        k_regions, v_regions = (t.transpose(2, 3).flatten(3, 4) for t in (k_regions, v_regions))
    keep = _allowed(size, index, regions, segments, valid_size, q.device)
    with without_autocast(q.device):
        scores = (q_regions * scale) @ k_regions.transpose(-2, -1)  # [B, R, G, n, K·n]
        if bias is not None:
            scores = scores + bias.to(accumulate)
        if keep is None:
            weights = scores.softmax(-1)
        else:  # the smallest finite score, not -inf: rows without any key must have finite gradients
            weights = scores.masked_fill(~keep, torch.finfo(accumulate).min).softmax(-1).masked_fill(~keep, 0)
        out = weights @ v_regions
    return from_regions(out.transpose(2, 3).to(dtype), regions, size)


def _allowed(
    size: tuple[int, int],
    index: Tensor | None,
    regions: tuple[int, int],
    segments: Tensor | None,
    valid_size: tuple[int, int] | None,
    device: torch.device,
) -> Tensor | None:
    """Which keys a query may see: bool [1 or B, R, 1, 1 or n, K·n], or None for all."""

    def of_keys(t: Tensor) -> Tensor:  # [R, n] -> [1 or B, R, 1, 1, K·n]
        return (t[None] if index is None else t[index].flatten(2))[:, :, None, None]

    allowed = None
    if valid_size is not None:
        allowed = of_keys(valid_tokens(size, valid_size, regions, device))
    if segments is not None:
        segments = to_regions(segments[None], regions)[0]  # [R, n]
        same = segments[None, :, None, :, None] == of_keys(segments)
        allowed = same if allowed is None else allowed & same
    return allowed
