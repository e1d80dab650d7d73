"""Neighborhood attention: a token attends to those nearest to it.

NAT (arXiv:2204.07143), dilated as in DiNAT (arXiv:2209.15001), with a stride as in GNA (arXiv:2504.16922).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visionzoo.kernels.checks import check_qkv
from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.neighborhood_attention import reference


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head softmax attention of each token to the kernel_size nearest ones along each axis, itself among them.

    Along an axis the tokens whose places are equal modulo the dilation d are a map of their own, and a token sees
    only those of its map. Its window of kernel_size neighbors is centered on it, except that near a border it is
    shifted to lie inside the map: every token has equally many neighbors. An even kernel has one neighbor more before
    the token than after it. With a stride s, s tokens in a row share the window of the middle one, which is the one
    right of the middle if s is even; the last of a map that s does not divide have what is left of the group, and its
    last token where the middle one is missing. With s = kernel_size the windows do not overlap, but at the end of a
    map that s does not divide. With y and x counted in tokens the score of a query at (i, j) and a key at (y, x) is

        scale·(q · k) + bias[g, (y - i) / d + kernel_size - 1, (x - j) / d + kernel_size - 1],

    as in NATTEN (https://github.com/SHI-Labs/NATTEN at 8c8729f, MIT, the bias as in its 0.14.6, which had no stride).

    Args:
        q: queries [B, H, W, G, D].
        k: keys, like q.
        v: values, like q.
        kernel_size: neighbors along an axis, or (vertical, horizontal); at least 1.
        dilation: step from neighbor to neighbor, or (vertical, horizontal); at least 1. kernel_size · dilation may
            be at most H and W.
        stride: tokens along an axis that share a window, or (vertical, horizontal); from 1 to kernel_size. More means
            fewer windows that a block of queries looks at, so that the kernels are faster.
        bias: relative position bias [G, 2·vertical kernel_size - 1, 2·horizontal kernel_size - 1], floating point; it
            gets its gradient. None for none.
        scale: of the products of queries and keys; None means D^-½.
        backend: "auto", "reference" or "triton".

    Returns:
        [B, H, W, G, D] in q's dtype; scores, softmax and sums are float32 at least.

    Raises:
        ValueError: if shapes, dtypes, kernel, dilation, stride, bias or backend are not as described.
    """
    kernel, step = _pair("kernel_size", kernel_size), _pair("dilation", dilation)
    shared = _pair("stride", stride)
    if shared[0] > kernel[0] or shared[1] > kernel[1]:
        raise ValueError(
            f"neighborhood_attention: stride may be at most kernel_size, or tokens would be in no window, got "
            f"{stride=} and {kernel_size=}"
        )
    check_qkv("neighborhood_attention", q, k, v)
    for axis, side, length, apart in zip(("height", "width"), q.shape[1:3], kernel, step, strict=True):
        if length * apart > side:
            raise ValueError(
                f"neighborhood_attention: kernel_size · dilation = {length} · {apart} = {length * apart} exceeds the "
                f"{axis} {side} of the map; take a smaller kernel_size or dilation, or pad the map first "
                f"(visionzoo.layers.padding.pad_to_size, as NeighborhoodMixer does)"
            )
    if bias is not None:
        _check_bias(bias, q, kernel)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if choose("neighborhood_attention", backend, q) == "triton":
        from visionzoo.kernels.neighborhood_attention import triton

        return triton.forward(q, k, v, kernel_size=kernel, dilation=step, stride=shared, bias=bias, scale=scale)
    return reference.forward(q, k, v, kernel_size=kernel, dilation=step, stride=shared, bias=bias, scale=scale)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(entry, int) and entry >= 1 for entry in pair):
        raise ValueError(
            f"neighborhood_attention: {name} must be a positive integer or (vertical, horizontal), got {value!r}"
        )
    return pair


def _check_bias(bias: Tensor, q: Tensor, kernel: tuple[int, int]) -> None:
    expected = (q.shape[3], 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    if bias.shape != expected:
        raise ValueError(
            f"neighborhood_attention: bias must be [G, 2·kernel_size - 1, 2·kernel_size - 1] = {list(expected)} for "
            f"kernel_size={kernel}, got {tuple(bias.shape)}"
        )
    if not bias.is_floating_point() or bias.device != q.device:
        raise ValueError(
            f"neighborhood_attention: bias must be floating point on {q.device}, got {bias.dtype} on {bias.device}"
        )
