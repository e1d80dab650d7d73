"""Linear attention: features of queries and keys instead of the softmax, so that the cost is linear in tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visionzoo.kernels.checks import check_qkv
from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.linear_attention import reference

FEATURE_MAPS = ("relu", "elu", "softmax", "focused")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "relu",
    focusing_factor: float = 3.0,
    temperature: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Every query attends to every key with the weight φ(q)·φ(k), none masked; O(N·G·D²).

    With N keys the output is φ(q)·(Σ φ(k) vᵀ / N) / (φ(q)·(Σ φ(k) / N) + eps). The features φ(x) are

    - "relu": max(x, 0),
    - "elu": elu(x) + 1,
    - "softmax": of a query over its D numbers, of a key over all N keys, times N,
    - "focused": with t = (max(x, 0) + 1e-6) / temperature and p = `focusing_factor`, the power tᵖ rescaled to the
      length of t; lengths are over all heads of a token (FLatten, arXiv:2308.00442).

    Args:
        q: queries [B, H, W, G, D].
        k: keys [B, H', W', G, D]; H' and W' may differ from H and W.
        v: values, like k.
        feature_map: one of those above.
        focusing_factor: p > 0 of "focused".
        temperature: positive, [G, D], of "focused"; None means 1.
        eps: keeps the division finite where no key has a feature of the query's; zero or positive.
        backend: "auto", "reference" or "triton".

    Returns:
        [B, H, W, G, D] in q's dtype; features, sums and states are float32 at least, under autocast too.

    Raises:
        ValueError: if shapes, dtypes, names or numbers are not as described.
    """
    check_qkv("linear_attention", q, k, v, share="BGD")
    if k.shape != v.shape:
        raise ValueError(f"linear_attention: v must be like k {tuple(k.shape)}, got {tuple(v.shape)}")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"linear_attention: unknown {feature_map=}, expected one of {FEATURE_MAPS}")
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
    if choose("linear_attention", backend, q, v) == "triton":
        from visionzoo.kernels.linear_attention import triton

        return triton.forward(q, k, v, **arguments)
    return reference.forward(q, k, v, **arguments)
