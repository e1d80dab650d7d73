"""Score attention: attention of all tokens to all whose weights are not the softmax of the scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visionzoo.former_names import with_former_names
from visionzoo.kernels.checks import check_qkv
from visionzoo.kernels.dispatch import choose
from visionzoo.kernels.score_attention import reference

NORMALIZERS = tuple(reference.NORMALIZERS)


@with_former_names(normaliser="normalizer")
def score_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalizer: str,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every query attends to every key with weights that are a function of the scores s = scale·(q · k).

    Of N keys the weights are

    - "sigmoid": sigmoid of s - log N (arXiv:2409.04431),
    - "relu": max(s, 0) (ReLA, arXiv:2104.07012, before its norm),
    - "signed_softmax": softmax of |s| with the sign of s (Cog attention, arXiv:2411.07176),
    - "softplus": softplus of s, divided by the sum (arXiv:2501.13428, without its factors of length),
    - "taylor": 1 + s + s²/2, divided by the sum (as in TaylorShift, arXiv:2403.02920).

    None of them needs a second look at the keys: the kernels hold no map of scores, and memory grows with the tokens.

    Args:
        q: queries [B, H, W, G, D].
        k: keys [B, H', W', G, D]; H' and W' may differ from H and W.
        v: values, like k.
        normalizer: one of those above.
        scale: of the products of queries and keys; None means D^-½.
        dtype: of the output, floating point; None means q's. Sums over many keys can pass what float16 holds.
        backend: "auto", "reference" or "triton".

    Returns:
        [B, H, W, G, D]; scores, weights and sums are float32 at least.

    Raises:
        ValueError: if shapes, dtypes, names or numbers are not as described.
    """
    check_qkv("score_attention", q, k, v, share="BGD")
    if k.shape != v.shape:
        raise ValueError(f"score_attention: v must be like k {tuple(k.shape)}, got {tuple(v.shape)}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"score_attention: unknown {normalizer=}, expected one of {NORMALIZERS}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"score_attention: dtype must be floating point or None, got {dtype}")
    arguments: dict[str, Any] = {
        "normalizer": normalizer,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "dtype": q.dtype if dtype is None else dtype,
    }
    if choose("score_attention", backend, q, k) == "triton":
        from visionzoo.kernels.score_attention import triton

        return triton.forward(q, k, v, **arguments)
    return reference.forward(q, k, v, **arguments)
