"""Linear attention: features of queries and keys in the place of the softmax, so that the cost is linear in tokens."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from visionzoo.kernels.checks import check_qkv
from visionzoo.kernels.dispatch import MAX_HEAD_DIM, choose
from visionzoo.kernels.linear_attention import reference

FEATURE_MAPS = ("relu", "elu", "softmax", "focused", "identity")


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    feature_map: str = ..., focusing_factor: float = ..., temperature: Tensor | None = ..., eps: float = ...,
    return_weights: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    feature_map: str = ..., focusing_factor: float = ..., temperature: Tensor | None = ..., eps: float = ...,
    return_weights: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "relu",
    focusing_factor: float = 3.0,
    temperature: Tensor | None = None,
    eps: float = 1e-6,
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Every query attends to every key with the weight φ(q)·φ(k), none masked; O(N·G·D·V).

    With N keys the output is φ(q)·(Σ φ(k) vᵀ / N) / (w + eps), where w = φ(q)·(Σ φ(k) / N) is the mean weight of a
    query. The features φ(x) are

    - "relu": max(x, 0),
    - "elu": elu(x) + 1,
    - "softmax": of a query over its D numbers, of a key over all N keys, times N,
    - "focused": with t = (max(x, 0) + 1e-6) / temperature and p = `focusing_factor`, the power tᵖ rescaled to the
      length of t; lengths are over all heads of a token (FLatten, arXiv:2308.00442),
    - "identity": x, where the caller has computed the features. Any width D: the Triton kernels take wide ones in parts
      of at most 128.

    Args:
        q: queries [B, H, W, G, D].
        k: keys [B, H', W', G, D]; H' and W' may differ from H and W.
        v: values [B, H', W', G, V]; V may differ from D, and for "identity" the dtype from that of q and k: values in
            half precision under features in float32.
        feature_map: one of those above.
        focusing_factor: p > 0 of "focused".
        temperature: positive, [G, D], of "focused"; None means 1.
        eps: keeps the division finite where no key has a feature of the query's; zero or positive.
        return_weights: also return the mean weights w, so that output times (w + eps) is the sum before the division.
        backend: "auto", "reference" or "triton".

    Returns:
        [B, H, W, G, V] in v's dtype, and with `return_weights` the mean weights [B, H, W, G] in float32 at least.
        Features, sums and states are float32 at least, under autocast too. Gradients pass through both.

    Raises:
        ValueError: if shapes, dtypes, names or numbers are not as said.
    """
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"linear_attention: unknown {feature_map=}, expected one of {FEATURE_MAPS}")
    check_qkv("linear_attention", q, k, share="BGD")
    given = feature_map == "identity"
    fits = given and v.is_floating_point() and torch.promote_types(q.dtype, v.dtype) == q.dtype
    if v.shape[:-1] != k.shape[:-1] or v.device != k.device or not (v.dtype == k.dtype or fits):
        lower = ", or of lower precision" if given else ""
        raise ValueError(
            f"linear_attention: v must be like k but for the width, {list(k.shape[:-1])} and V, {k.dtype} on {k.device}"
            f"{lower}; got {list(v.shape)}, {v.dtype} on {v.device}"
        )
    if focusing_factor <= 0 or eps < 0:
        raise ValueError(
            f"linear_attention: focusing_factor must be positive and eps not negative, got {focusing_factor=}, {eps=}"
        )
    if temperature is not None and (
        feature_map != "focused"
        or temperature.shape != q.shape[3:]
        or temperature.device != q.device
        or not temperature.is_floating_point()
    ):
        raise ValueError(
            f"linear_attention: temperature is for feature_map='focused', floating point [G, D] = {list(q.shape[3:])} "
            f"on {q.device}; got {feature_map=} and {tuple(temperature.shape)} {temperature.dtype} on "
            f"{temperature.device}"
        )
    arguments: dict[str, Any] = {
        "feature_map": feature_map,
        "focusing_factor": focusing_factor,
        "temperature": temperature,
        "eps": eps,
    }
    if choose("linear_attention", backend, q[..., :MAX_HEAD_DIM] if given else q, v) == "triton":
        from visionzoo.kernels.linear_attention import triton

        out, weights = triton.forward(q, k, v, **arguments, weights=return_weights)
    else:
        out, weights = reference.forward(q, k, v, **arguments)
    return (out, weights) if return_weights else out
