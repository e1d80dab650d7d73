"""Routed attention: the tokens of a region attend to the tokens of a list of regions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visionzoo.kernels.checks import check_qkv
from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.regions import check_grid, check_valid_size
from visionzoo.kernels.routed_attention import reference


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    *,
    regions: int | tuple[int, int],
    scale: float | None = None,
    bias: Tensor | None = None,
    segments: Tensor | None = None,
    weights: Tensor | None = None,
    valid_size: tuple[int, int] | None = None,
    check_index: bool = True,
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
        bias: added to the scaled scores of every sample, [G, n, K·n] or [1 or R, G, n, K·n] for n tokens in a region
            (numbered row by row) and K = 1 where index is None; floating point. None for none.
        segments: integers [H, W]; tokens attend only to tokens of their own number, as in shifted windows, where what
            the shift brought together from opposite borders stays apart. Queries without any such key give 0. None:
            no limits.
        weights: of soft routing, floating point [B, R, K]: keys and values of a listed region are multiplied by its
            weight. None: they count as they are.
        valid_size: (height, width) of the map without its padding at the bottom and right; padded keys are then left
            out. Every query's list needs one region that is not only padding, as `route_regions` ensures; queries
            in regions of padding give 0. None: every token counts.
        check_index: look whether `index` names regions that exist; on a GPU this waits for it. Without, and under
            torch.compile, the Triton kernels leave out regions that do not exist.
        backend: "auto", "reference" or "triton".

    Returns:
        [B, H, W, G, D] in q's dtype; scores, softmax and sums are float32 at least.

    Raises:
        ValueError: if shapes, dtypes, regions, index, bias, segments, weights or backend are not as described.
    """
    check_qkv("routed_attention", q, k, v)
    regions = check_grid("routed_attention", regions, (q.shape[1], q.shape[2]))
    check_valid_size("routed_attention", q, valid_size)
    if index is not None:
        _check_index(index, q, regions[0] * regions[1], check_index)
    if bias is not None:
        _check_bias(bias, q, regions[0] * regions[1], 1 if index is None else index.shape[2])
    if segments is not None:
        _check_segments(segments, q)
    if weights is not None:
        _check_weights(weights, index, q)
    arguments: dict[str, Any] = {
        "regions": regions,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "bias": bias,
        "segments": segments,
        "weights": weights,
        "valid_size": valid_size,
    }
    if choose("routed_attention", backend, q) == "triton":
        from visionzoo.kernels.routed_attention import triton

        return triton.forward(q, k, v, index, **arguments)
    return reference.forward(q, k, v, index, **arguments)


def _check_index(index: Tensor, q: Tensor, count: int, check_values: bool) -> None:
    if index.ndim != 3 or index.shape[0] != q.shape[0] or index.shape[1] != count or index.shape[2] < 1:
        raise ValueError(
            f"routed_attention: index must be [B, R, K] = [{q.shape[0]}, {count}, K ≥ 1], got {tuple(index.shape)}"
        )
    if index.is_floating_point() or index.is_complex() or index.device != q.device:
        raise ValueError(
            f"routed_attention: index must hold integers on {q.device}, got {index.dtype} on {index.device}"
        )
    # values of meta and fake tensors cannot be looked at
    looks = type(index) is Tensor and index.device.type != "meta" and not torch.compiler.is_compiling()
    if check_values and looks and index.numel():
        low, high = index.aminmax()
        if low < 0 or high >= count:
            raise ValueError(f"routed_attention: index must name regions 0 to {count - 1}, got {low} to {high}")


def _check_bias(bias: Tensor, q: Tensor, count: int, listed: int) -> None:
    tokens = q.shape[1] * q.shape[2] // count
    last = (q.shape[3], tokens, listed * tokens)
    if bias.shape[-3:] != last or bias.ndim not in (3, 4) or (bias.ndim == 4 and bias.shape[0] not in (1, count)):
        raise ValueError(
            f"routed_attention: bias must be [G, n, K·n] = {list(last)}, or that with 1 or R = {count} in front, "
            f"got {tuple(bias.shape)}"
        )
    if not bias.is_floating_point() or bias.device != q.device:
        raise ValueError(
            f"routed_attention: bias must be floating point on {q.device}, got {bias.dtype} on {bias.device}"
        )


def _check_weights(weights: Tensor, index: Tensor | None, q: Tensor) -> None:
    if index is None or weights.shape != index.shape:
        raise ValueError(
            f"routed_attention: weights must have the shape of index, "
            f"{'which is None' if index is None else tuple(index.shape)}, got {tuple(weights.shape)}"
        )
    if not weights.is_floating_point() or weights.device != q.device:
        raise ValueError(
            f"routed_attention: weights must be floating point on {q.device}, got {weights.dtype} on {weights.device}"
        )


def _check_segments(segments: Tensor, q: Tensor) -> None:
    if segments.shape != q.shape[1:3]:
        raise ValueError(
            f"routed_attention: segments must be [H, W] = {list(q.shape[1:3])}, got {tuple(segments.shape)}"
        )
    if segments.is_floating_point() or segments.is_complex() or segments.device != q.device:
        raise ValueError(
            f"routed_attention: segments must hold integers on {q.device}, got {segments.dtype} on {segments.device}"
        )
