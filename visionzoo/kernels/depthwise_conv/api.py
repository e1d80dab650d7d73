"""Depthwise convolution of [B, H, W, C] maps: each channel with a small kernel of its own, the map keeps its size."""

from __future__ import annotations

from torch import Tensor

from visionzoo.kernels.depthwise_conv import library, reference
from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.precision import autocast_dtype
from visionzoo.kernels.regions import check_grid

MAX_KERNEL = 11  # side of the largest kernel that the Triton kernels take: its square is held in registers


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    regions: int | tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with its own kernel, in steps of one, with zeros around the map; add a residual.

    Products and sums are float32 at least. Under autocast x, weight and bias may have any floating dtypes; the Triton
    kernels then read them as they are.

    Args:
        x: map [B, H, W, C]; views that keep the channels side by side, such as a part of a projection, are not copied.
        weight: [C, 1, k, k] with odd k, as torch has it.
        bias: [C]; None for none.
        residual: floating point [B, H, W, C], added to the result; may be x itself. None for none.
        regions: regions per side, or (vertical, horizontal), that are convolved each by itself, with zeros around it;
            they must divide H and W. None: the whole map.
        backend: "auto", "reference" or "triton".

    Returns:
        [B, H, W, C] in x's dtype, under autocast in autocast's; or in residual's where that is wider.

    Raises:
        ValueError: if shapes, dtypes, devices, regions or backend are not as said.
    """
    _check(x, weight, bias, residual)
    if regions is not None:
        regions = check_grid("depthwise_conv", regions, (x.shape[1], x.shape[2]))
    kernel = weight.shape[-1]
    unsupported = f"its kernels take kernels up to {MAX_KERNEL}, got {kernel}" if kernel > MAX_KERNEL else None
    small = "library" if regions is None else None
    ran = choose("depthwise_conv", backend, x, unsupported=unsupported, max_width=None, library=small)
    if ran == "triton":
        from visionzoo.kernels.depthwise_conv import triton

        return triton.forward(x, weight, bias, residual=residual, regions=regions)
    if ran == "library":
        return library.forward(x, weight, bias, residual=residual)
    return reference.forward(x, weight, bias, residual=residual, regions=regions)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"depthwise_conv: x must be floating point [B, H, W, C], got {x.dtype} {tuple(x.shape)}")
    channels, kernel = x.shape[3], weight.shape[-1]
    if weight.ndim != 4 or weight.shape != (channels, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(
            f"depthwise_conv: weight must be [C, 1, k, k] with C = {channels} and odd k, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"depthwise_conv: bias must be [C] = [{channels}], got {tuple(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.device != x.device or not t.is_floating_point():
            raise ValueError(
                f"depthwise_conv: {name} must be floating point on {x.device}, got {t.dtype} on {t.device}"
            )
        if t.dtype != x.dtype and autocast_dtype(x.device) is None:
            raise ValueError(f"depthwise_conv: {name} must have x's dtype {x.dtype}, got {t.dtype}")
    if residual is not None and (
        residual.shape != x.shape or residual.device != x.device or not residual.is_floating_point()
    ):
        raise ValueError(
            f"depthwise_conv: residual must be floating point like x, {tuple(x.shape)} on {x.device}, "
            f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
        )
