"""What every attention asks of its queries, keys and values."""

from __future__ import annotations

from torch import Tensor

AXES = "BHWGD"


def check_qkv(operation: str, q: Tensor, k: Tensor, v: Tensor | None = None, *, share: str = AXES) -> None:
    """Check that q, k and v, where there is one, are maps [B, H, W, G, D] that go together.

    Args:
        operation: for messages.
        q: queries.
        k: keys.
        v: values.
        share: letters of the axes that must be equally long.

    Raises:
        ValueError: if they are not maps, differ in one of these axes, in dtype or device, or are not floating point.
    """
    last = k if v is None else v
    alike = (
        q.shape == k.shape == last.shape and q.dtype == k.dtype == last.dtype and q.device == k.device == last.device
    )
    if alike and q.ndim == 5 and q.is_floating_point():
        return  # as nearly always, and found at a fraction of the cost
    tensors = (q, k) if v is None else (q, k, v)
    if any(t.ndim != 5 for t in tensors) or any(_lengths(t, share) != _lengths(q, share) for t in tensors[1:]):
        how = "of one shape" if share == AXES else f"with the same {', '.join(share[:-1])} and {share[-1]}"
        shapes = " and ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"{operation}: {_names(v)} must be [B, H, W, G, D] {how}, got {shapes}")
    if not q.is_floating_point() or any(t.dtype != q.dtype or t.device != q.device for t in tensors):
        kinds = " and ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise ValueError(f"{operation}: {_names(v)} must share a floating dtype and a device, got {kinds}")


def _lengths(t: Tensor, axes: str) -> tuple[int, ...]:
    return tuple(t.shape) if axes == AXES else tuple(t.shape[AXES.index(axis)] for axis in axes)


def _names(v: Tensor | None) -> str:
    return "q and k" if v is None else "q, k and v"
