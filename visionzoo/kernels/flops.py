"""Floating point operations of the Triton operators, for `torch.utils.flop_counter`; plain Python, of shapes.

What is counted is what torch counts of a definition in plain torch: products of matrices and convolutions, two
operations for a product and its sum, and twice as many backward, one product for the gradient of each factor. Nothing
is added for what kernels compute anew, and nothing for elementwise work: norms count as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

Shape = Sequence[int]


def backward(forward: Callable[..., int], saved: int) -> Callable[..., int]:
    """Return the formula of an operator's backward pass.

    Args:
        forward: formula of the operator.
        saved: number of arguments in front of the operator's own: the gradient and what the forward pass left.
    """
    return lambda *inputs, out_shape: 2 * forward(*inputs[saved:], out_shape=None)


def routed_attention(q: Shape, k: Shape, v: Shape, index: Shape | None, *rest: Any, out_shape: Any) -> int:
    """Scores with the tokens of the listed regions, and the sums of their values."""
    regions = rest[3]
    keys = q[1] * q[2] // (regions[0] * regions[1]) * (1 if index is None else index[2])
    return 4 * prod(q) * keys


def neighborhood_attention(q: Shape, k: Shape, v: Shape, bias: Any, kernel: Shape, *_: Any, out_shape: Any) -> int:
    """Scores with the tokens of the window alone, and the sums of their values."""
    return 4 * prod(q) * prod(kernel)


def score_attention(q: Shape, k: Shape, *_: Any, out_shape: Any) -> int:
    """Scores with all keys, and the sums of their values."""
    return 4 * prod(q) * k[1] * k[2]


def halo_attention(
    q: Shape, k: Shape, v: Shape, rel_height: Shape, rel_width: Shape, block: int, halo: int, *_: Any, out_shape: Any
) -> int:
    """Scores with the keys of the window, products with the embeddings of its rows and columns, sums of values."""
    window = block + 2 * halo
    queries = prod(q[:4])
    return 2 * queries * (q[4] * (window**2 + 2 * window) + v[4] * window**2)


def linear_attention(q: Shape, k: Shape, v: Shape, *_: Any, out_shape: Any) -> int:
    """Products of keys and values, of queries with these, and of queries with the mean key."""
    return 2 * (prod(k) * v[4] + prod(q) * v[4] + prod(q))


def route_regions(q: Shape, k: Shape, regions: Shape, *_: Any, out_shape: Any) -> int:
    """Products of all regions' means."""
    return 2 * q[0] * prod(regions) ** 2 * q[3] * q[4]


def channel_products(x: Shape, y: Shape, *, out_shape: Any) -> int:
    """Products of the channels of a head over all tokens."""
    return 2 * prod(x) * x[4]


def channel_mix(matrix: Shape, x: Shape, *, out_shape: Any) -> int:
    """Products of a matrix with the channels of a head."""
    return 2 * prod(x) * x[4]


def depthwise_conv(x: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    """One product for each tap and number."""
    return 2 * prod(x) * prod(weight[2:])


def depthwise_conv_backward(
    grad: Shape, x: Shape, weight: Shape, add_x: bool, regions: Any, x_grad: bool, weight_grad: bool, *, out_shape: Any
) -> int:
    """As forward, for each of the gradients that is asked for."""
    return (int(x_grad) + int(weight_grad)) * depthwise_conv(x, weight, out_shape=None)
