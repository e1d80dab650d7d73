"""Layer normalization of narrow rows, for which torch's own kernel leaves most of a GPU idle."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.layer_norm import reference
from visionzoo.kernels.precision import autocast_dtype

MAX_WIDTH = 1024  # a program holds whole rows
# Below that many rows torch's kernel takes less time than it takes to launch ours (H100, widths 64 to 512).
MIN_ROWS = 16384


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """Normalize the last axis to mean 0 and variance 1, then scale and shift: as `torch.nn.functional.layer_norm`.

    "auto" takes the Triton kernels for at least 16,384 rows; not under torch.compile, which fuses the plain form with
    its neighbors.

    Args:
        x: [..., C].
        weight: scale [C].
        bias: shift [C].
        eps: added to the variance.
        backend: "auto", "reference" or "triton".

    Returns:
        [..., C] in x's dtype, or under autocast in autocast's: torch would give float32 there, which the linear layers
        and convolutions that follow norms round to it anyway. Statistics are float32 at least.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or the backend cannot run.
    """
    if x.ndim < 1 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"layer_norm: weight and bias must be [C] for x [..., C], got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)} for x {tuple(x.shape)}"
        )
    if not x.is_floating_point() or not x.device == weight.device == bias.device:
        raise ValueError(
            f"layer_norm: x, weight and bias must be floating point on one device, got {x.dtype} on {x.device}, "
            f"{weight.dtype} on {weight.device} and {bias.dtype} on {bias.device}"
        )
    out_dtype = autocast_dtype(x.device) or x.dtype
    if choose("layer_norm", backend, x, avoid=_slower(x), max_width=MAX_WIDTH, max_numbers=None) == "triton":
        from visionzoo.kernels.layer_norm import triton

        return triton.forward(x, weight, bias, eps=eps, out_dtype=out_dtype)
    return reference.forward(x, weight, bias, eps=eps, out_dtype=out_dtype)


def _slower(x: Tensor) -> str | None:
    """Say why the plain form takes less time, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain form with its neighbors"
    return f"torch is as fast for fewer than {MIN_ROWS} rows" if x.numel() < MIN_ROWS * x.shape[-1] else None
