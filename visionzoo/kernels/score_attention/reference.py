"""Specification of score attention, in plain torch; runs in any floating dtype and under autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzoo.kernels.precision import without_autocast


def forward(q: Tensor, k: Tensor, v: Tensor, *, normalizer: str, scale: float, dtype: torch.dtype) -> Tensor:
    """Attention of [B, H, W, G, D] tensors as `score_attention` says; holds all scores."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    size = q.shape[1:3]
    with without_autocast(q.device):
        q, k, v = (t.to(accumulate).flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # [B, G, N, D]
        out = NORMALIZERS[normalizer]((q * scale) @ k.transpose(-2, -1)) @ v
    return out.transpose(1, 2).unflatten(1, size).to(dtype)


def relu(scores: Tensor) -> Tensor:
    """max(s, 0); no sum is taken (ReLA, arXiv:2104.07012)."""
    return scores.relu()


def sigmoid(scores: Tensor) -> Tensor:
    """Sigmoid of s - log N (Ramapuram et al., arXiv:2409.04431); no sum is taken."""
    return (scores - scores.new_full((), scores.shape[-1]).log()).sigmoid()


def signed_softmax(scores: Tensor) -> Tensor:
    """Softmax of |s| with the sign of s: weights may be negative (Cog attention, arXiv:2411.07176)."""
    return scores.sign() * scores.abs().softmax(-1)


def softplus(scores: Tensor) -> Tensor:
    """Softplus of s, divided by the sum (arXiv:2501.13428, without its factors of length)."""
    # As softmax of the logarithm: rows of very negative scores have no sum in float32.
    low = scores.clamp(max=-20)
    high = F.softplus(scores.clamp(min=-20), threshold=40).log()
    return torch.where(scores < -20, low - low.exp() / 2, high).softmax(-1)


def taylor(scores: Tensor) -> Tensor:
    """1 + s + s²/2, divided by the sum (Taylor softmax, as in TaylorShift, arXiv:2403.02920)."""
    weights = 1 + scores + scores.square() / 2
    return weights / weights.sum(-1, keepdim=True)


# of scores [..., N] of N keys, float32 at least
NORMALIZERS = {f.__name__: f for f in (relu, sigmoid, signed_softmax, softplus, taylor)}
