"""Group normalisation with one group: each sample as a whole, for which torch reads and writes maps thrice."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.group_norm import library, reference
from visionzoo.kernels.precision import autocast_dtype

MAX_WIDTH = 2048  # a program holds the channels of whole tokens


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """Normalise each sample to mean 0 and variance 1, then scale and shift the channels.

    The same as `torch.nn.functional.group_norm` with one group, of maps whose channels lie side by side. "auto" takes
    plain torch under torch.compile, which fuses it with its neighbors.

    Args:
        x: [B, H, W, C]; views that keep the channels side by side, such as the first so many of them, are not copied.
        weight: scale [C].
        bias: shift [C].
        eps: added to the variance.
        backend: "auto", "reference" or "triton".

    Returns:
        [B, H, W, C] in x's dtype, or under autocast in autocast's, as `layer_norm`. Statistics are float32 at least.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or the backend cannot run.
    """
    if x.ndim != 4 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"group_norm: weight and bias must be [C] for x [B, H, W, C], got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)} for x {tuple(x.shape)}"
        )
    if not x.is_floating_point() or not x.device == weight.device == bias.device:
        raise ValueError(
            f"group_norm: x, weight and bias must be floating point on one device, got {x.dtype} on {x.device}, "
            f"{weight.dtype} on {weight.device} and {bias.dtype} on {bias.device}"
        )
    out_dtype = autocast_dtype(x.device) or x.dtype
    slower = "torch.compile fuses the plain form with its neighbors" if torch.compiler.is_compiling() else None
    ran = choose("group_norm", backend, x, avoid=slower, max_width=MAX_WIDTH, library="library")
    if ran == "triton":
        from visionzoo.kernels.group_norm import triton

        return triton.forward(x, weight, bias, eps=eps, out_dtype=out_dtype)
    if ran == "library":
        return library.forward(x, weight, bias, eps=eps, out_dtype=out_dtype)
    return reference.forward(x, weight, bias, eps=eps, out_dtype=out_dtype)
