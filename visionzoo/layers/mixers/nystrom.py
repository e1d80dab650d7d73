"""Attention by landmarks: the Nyström approximation of its matrix (Nyströmformer, arXiv:2102.03902)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.attention import attend
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.tracing import smaller


class NystromMixer(Mixer):
    """Tokens attend to L landmarks, which attend to all tokens.

        y = softmax(q k̃ᵀ)·softmax(q̃ k̃ᵀ)⁺·softmax(q̃ kᵀ)·v, q̃ and k̃ means of stretches

    Time: O(N·L·C) and six products of L × L matrices an iteration; memory: O(N·(C + L·G)).

    Landmarks are means of stretches of tokens, row by row: of N tokens L - N mod L stretches are ⌊N / L⌋ long, those
    after them longer by one. With landmarks q̃, k̃ the output is softmax(q·k̃ᵀ)·A⁺·softmax(q̃·kᵀ)·v for A =
    softmax(q̃·k̃ᵀ), whose pseudo-inverse A⁺ is iterated from Aᵀ over its largest column sum, of each sample and head.
    Softmax, inverse and sums are float32 at least. Prefix tokens are queries and keys like others, and in no landmark.

    Facts from https://github.com/mlpen/Nystromformer at 5689313 (Apache-2.0).

    Args:
        dim: channels C.
        num_heads: attention heads; scores are divided by √(C / heads).
        qkv_bias: whether the projection to q, k, v has a bias.
        num_landmarks: landmarks L, as many as tokens where these are fewer; 0 for attention without.
        num_iterations: of the pseudo-inverse.
        value_kernel: kernel of a convolution over the row of tokens, of each head's values, that is added; odd, or None
            for none.
        out_dim: channels of q, k, v and the output; None for C.
        value_residual: add the values to the output.

    Raises:
        ValueError: if the heads do not divide the channels, the kernel is even, or a number is not positive.

    >>> NystromMixer(64, 2, num_landmarks=16)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    SCORE_MAP = True

    needs_map_size = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        qkv_bias: bool = False,
        num_landmarks: int = 64,
        num_iterations: int = 6,
        value_kernel: int | None = None,
        out_dim: int | None = None,
        value_residual: bool = False,
    ):
        super().__init__(dim, num_heads)
        out_dim = dim if out_dim is None else out_dim
        if num_landmarks < 0 or num_iterations < 1:
            raise ValueError(
                f"NystromMixer: num_landmarks must not be negative, num_iterations positive, got {num_landmarks=} and "
                f"{num_iterations=}"
            )
        if out_dim < 1 or out_dim % self.num_heads:
            raise ValueError(f"NystromMixer: num_heads={self.num_heads} must divide out_dim, got {out_dim=}")
        self.check_kernels(value_kernel=value_kernel)
        self.out_dim, self.scale = out_dim, self.head_dim**-0.5
        self.num_landmarks, self.num_iterations, self.value_residual = num_landmarks, num_iterations, value_residual
        self.qkv = nn.Linear(dim, 3 * out_dim, bias=qkv_bias)
        self.conv: nn.Module | None = None
        if value_kernel:
            self.conv = nn.Conv2d(
                self.num_heads,
                self.num_heads,
                (value_kernel, 1),
                padding=(value_kernel // 2, 0),
                groups=self.num_heads,
                bias=False,
            )
        self.proj = nn.Linear(out_dim, out_dim)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: landmarks, for which the order matters, are only of the map."""
        return True

    def forward(self, x: Tensor, *, map_size: tuple[int, int] | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C'].

        With `map_size` (H, W) x is [B, 1, P + H·W, C]: P prefix tokens, then those of the map.
        """
        self.check_input(x)
        # [B, N, 3, G, D] -> [B, G, N, D]
        qkv = self.qkv(x).flatten(1, 2)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        first = 0 if map_size is None else q.shape[2] - map_size[0] * map_size[1]
        out = self._attend(q * self.scale, k, v, first) if self.num_landmarks else attend(q, k, v, scale=self.scale)
        if self.conv is not None:
            out = out + self.conv(v)
        out = self.proj(out.transpose(1, 2).flatten(2))
        if self.value_residual:
            out = out + v.transpose(1, 2).flatten(2)
        return out.unflatten(1, x.shape[1:3])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        with without_autocast(q.device):
            wide_q, wide_k, wide_v = (t.to(dtype) for t in (q, k, v))
            share = _stretches(q.shape[2] - first, self.num_landmarks, wide_q)
            near_q, near_k = (share @ t[:, :, first:] for t in (wide_q, wide_k))  # [B, G, L, D]
            seen = (near_q @ wide_k.mT).softmax(-1) @ wide_v
            inverse = self._inverse((near_q @ near_k.mT).softmax(-1))
            return ((wide_q @ near_k.mT).softmax(-1) @ (inverse @ seen)).to(q.dtype)

    def _inverse(self, a: Tensor) -> Tensor:
        """Pseudo-inverse of matrices [B, G, L, L] whose rows sum to 1."""
        one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        z = a.mT / a.sum(-2).amax(-1)[..., None, None]
        for _ in range(self.num_iterations):
            az = a @ z
            z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
        return z


def _stretches(length: int, count: int, like: Tensor) -> Tensor:
    """Weights [L, N] of the means of `count` stretches of N tokens, at most as many; the later ones may be longer."""
    made = smaller(count, length)
    place, stretch = torch.arange(length, device=like.device), torch.arange(made, device=like.device)[:, None]
    short = length // made
    shorter = made - length % made  # this many stretches are short
    begin = stretch * short + (stretch - shorter).clamp(min=0)
    size = short + (stretch >= shorter).long()
    return ((place >= begin) & (place < begin + size)).to(like.dtype) / size
