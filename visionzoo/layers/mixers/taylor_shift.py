"""Attention with a Taylor polynomial in place of the exponential (TaylorShift, arXiv:2403.02920)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.kernels.regions import is_symbolic
from visionzoo.layers.mixers.base import Mixer


class TaylorShiftMixer(Mixer):
    """Every token attends to every token with weights a·s² + b·s + c of the scores s, divided by their sum.

        yᵢ = Σⱼ (½sᵢⱼ² + sᵢⱼ + 1) vⱼ / Σⱼ (½sᵢⱼ² + sᵢⱼ + 1), s = τ·cos(qᵢ, kⱼ)

    Time: O(N²·C) or O(N·C·D²), whichever is less; memory: O(N²·G) or O(N·G·D²).

    It is computed in the cheaper of two forms, which are equal: directly in O(N²·C), or in O(N·C·D²) for heads of width
    D as linear attention over the D² + D + 1 products that the polynomial is made of. Scores and sums are float32 at
    least, whatever the input. torch.export for maps of any size cannot ask for the number of tokens, and takes the
    direct form unless `threshold` is below 1.

    Facts from https://github.com/tobna/TaylorShift at b290faa (MIT).

    Args:
        dim: channels C.
        num_heads: attention heads.
        qkv_bias: whether the projection to q, k, v has a bias.
        normalize_input: bring queries and keys to length 1, with a learned temperature for each head; else queries are
            scaled by C^-½.
        output_normalized: multiply the output by √(N / D), which keeps its size whatever the number of tokens.
        threshold: tokens above which the linear form runs; None for D² + D + 1.
        coefficients: a, b and c, for which no weight may be negative: a > 0 and c ≥ b² / 4a.

    Raises:
        ValueError: if the heads do not divide the channels, or the coefficients allow negative weights.

    >>> TaylorShiftMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        qkv_bias: bool = True,
        normalize_input: bool = True,
        output_normalized: bool = False,
        threshold: int | None = None,
        coefficients: tuple[float, float, float] = (0.5, 1.0, 1.0),
    ):
        super().__init__(dim, num_heads)
        a, b, c = coefficients
        if a <= 0 or c < b * b / (4 * a):
            raise ValueError(
                f"TaylorShiftMixer: coefficients (a, b, c) must have a > 0 and c >= b² / 4a, so that a·s² + b·s + c is "
                f"never negative, got {coefficients=}"
            )
        self.coefficients = coefficients
        self.output_normalized = output_normalized
        self.threshold = self.head_dim**2 + self.head_dim + 1 if threshold is None else threshold
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.temperature = nn.Parameter(torch.ones(1, self.num_heads, 1, 1)) if normalize_input else None
        self.proj = nn.Linear(dim, dim)

    @property
    def NO_WEIGHT_DECAY(self) -> tuple[str, ...]:
        """Names of the parameters of several axes that weight decay would harm."""
        return () if self.temperature is None else ("temperature",)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: any set of tokens will do."""
        return True

    @property
    def takes_dropped_tokens(self) -> bool:
        """Yes: their weights are 0."""
        return True

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; `keep` [B, N] is False for tokens that others do not see."""
        self.check_input(x)
        qkv = self.qkv(x)
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        count = x.shape[1] * x.shape[2]
        with without_autocast(x.device):
            # [B, H, W, G, D] -> [B, G, N, D]
            q, k, v = (t.flatten(1, 2).transpose(1, 2).to(dtype) for t in self.split_heads(qkv))
            if self.temperature is None:
                q = q * self.dim**-0.5
            else:
                q, k = F.normalize(q, dim=-1) * self.temperature, F.normalize(k, dim=-1)
            linear = self.threshold < 1 if is_symbolic(x) else count > self.threshold
            there = None if keep is None else keep[:, None, :, None]  # [B, 1, N, 1]
            out = self._linear(q, k, v, there) if linear else self._direct(q, k, v, there)
            if self.output_normalized:
                seen = count if there is None else there.sum(2, keepdim=True, dtype=dtype)
                out = out * (seen / self.head_dim) ** 0.5
        return self.proj(out.transpose(1, 2).reshape(x.shape).to(qkv.dtype))

    def _direct(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None) -> Tensor:
        a, b, c = self.coefficients
        scores = q @ k.mT
        weights = (a * scores + b) * scores + c
        if there is not None:
            weights = weights * there.mT
        return weights @ v / weights.sum(-1, keepdim=True)

    def _linear(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None) -> Tensor:
        a, b, c = self.coefficients
        one = torch.ones_like(q[..., :1])
        q, k = torch.cat([a * _pairs(q), b * q, c * one], -1), torch.cat([_pairs(k), k, one], -1)
        if there is not None:
            k = k * there
        state = k.mT @ torch.cat([v, one], -1) / v.shape[2]  # means: their size does not grow with the map
        out, total = (q @ state).split([v.shape[-1], 1], -1)
        return out / total


def _pairs(x: Tensor) -> Tensor:
    """Products of all pairs of channels: [..., D] to [..., D²]."""
    return (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
