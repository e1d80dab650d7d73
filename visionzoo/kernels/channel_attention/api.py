"""Channel attention (DaViT, arXiv:2204.03645): the channels of a head attend to each other, over all tokens."""

from __future__ import annotations

from torch import Tensor

from visionzoo.kernels.channel_attention import reference
from visionzoo.kernels.checks import check_qkv
from visionzoo.kernels.dispatch import choose


def channel_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Mix the channels of each head by the softmax of their products over all tokens; O(N·G·D²).

    With q, k and v as [N, D] matrices of one head, the output is (softmax(scale · kᵀ v) qᵀ)ᵀ with the softmax over v's
    channels: q plays the part that values have elsewhere.

    Args:
        q: what is mixed, [B, H, W, G, D].
        k: keys, like q.
        v: values, like q.
        scale: of the products; None means D^-½.
        backend: "auto", "reference" or "triton".

    Returns:
        [B, H, W, G, D] in q's dtype; products, softmax and sums are float32 at least.

    Raises:
        ValueError: if shapes, dtypes, devices or backend are not as described.
    """
    check_qkv("channel_attention", q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if choose("channel_attention", backend, q) == "triton":
        from visionzoo.kernels.channel_attention import triton

        return triton.forward(q, k, v, scale=scale)
    return reference.forward(q, k, v, scale=scale)
