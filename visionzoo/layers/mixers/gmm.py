"""Attention whose scores are multiplied by a mixture of Gaussians of the distance (GMM, arXiv:2309.05375)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.attention import attend
from visionzoo.layers.mixers.window import WindowMixer
from visionzoo.layers.padding import from_windows, to_windows


class GaussianMixture(nn.Module):
    """A learned mixture of Gaussians of the distance between two tokens for each head, Σ α·exp(-d² / 2(σ² + 1e-5)).

    Args:
        num_heads: heads G.
        num_kernels: Gaussians.
    """

    def __init__(self, num_heads: int, num_kernels: int):
        super().__init__()
        self.sigma = nn.Parameter(torch.randn(num_kernels, num_heads, 1, 1) * 10 + 10)
        self.alpha = nn.Parameter(torch.randn(num_kernels, num_heads, 1, 1) * 2)

    def forward(self, size: tuple[int, int] | torch.Size) -> Tensor:
        """Factors [G, N, N] of the N tokens of a map of (height, width) = `size`, float32 at least."""
        device = self.sigma.device
        wide = torch.promote_types(self.sigma.dtype, torch.float32)
        with without_autocast(device):
            width = 0.5 / (self.sigma.to(wide) ** 2 + 1e-5)
            axes = [torch.arange(length, device=device, dtype=wide) for length in size]
            rows, columns = (torch.exp(-width * (axis[:, None] - axis) ** 2) for axis in axes)  # [K, G, n, n]
            product = torch.einsum("kgab,kgcd->gacbd", self.alpha.to(wide) * rows, columns)
        return product.flatten(3).flatten(1, 2)


class GmmMixer(WindowMixer):
    """Every token attends to every token, or to those of its window, less to far ones.

        yᵢ = Σⱼ softmaxⱼ(qᵢ·kⱼ / √D · Σ_k a_k exp(-d(i, j)² / 2σ_k²)) vⱼ

    Time: O(N²·C), in windows O(N·w²·C); memory: O(N²·G), in windows O(N·w²·G).

    Scores are multiplied by a mixture of Gaussians before the softmax: those of far tokens become 0, not -∞. Scores,
    mixture and softmax are float32 at least. Any map: the mixture only knows the distance.

    Facts from https://github.com/CatworldLee/Gaussian-Mixture-Mask-Attention at b06b199 (no license).

    Args:
        dim: channels C.
        num_heads: attention heads.
        num_kernels: Gaussians of each head.
        head_dim: width of a head; None means C / num_heads.
        qkv_bias: whether the projection to q, k, v has a bias.
        talking_heads: mix the heads before the softmax, after the mixture, and once more after the softmax (CaiT).
        window_size: side w of windows, as in `WindowMixer`; None for none.
        shift_size: of the windows, from 0 to w - 1; None means half a window.
        relative_position_bias: add a learned number for each offset in a window and each head, after the mixture.
        mask_padding: leave padded tokens out of windows' attention.

    Raises:
        ValueError: if the heads do not divide the channels, there are no Gaussians, window or shift do not fit, or
            there are positions or a shift without windows.

    >>> import torch
    >>> GmmMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    RELAXES = QUANTIZES = False  # heads are mixed after the softmax
    SCORE_MAP = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        num_kernels: int = 5,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        talking_heads: bool = False,
        window_size: int | None = None,
        shift_size: int | None = 0,
        relative_position_bias: bool = False,
        mask_padding: bool = False,
    ):
        if num_kernels < 1:
            raise ValueError(f"GmmMixer: num_kernels must be positive, got {num_kernels=}")
        if window_size is None and (shift_size or relative_position_bias):
            raise ValueError(
                f"GmmMixer: only windows have shifts and position biases, got window_size=None, {shift_size=} and "
                f"{relative_position_bias=}; pass a window_size, or leave them out"
            )
        super().__init__(
            dim,
            num_heads,
            window_size=1 if window_size is None else window_size,
            shift_size=shift_size,
            relative_position_bias=relative_position_bias,
            qkv_bias=qkv_bias,
            mask_padding=mask_padding,
            head_dim=head_dim,
        )
        self.has_windows = window_size is not None
        self.mixture = GaussianMixture(self.num_heads, num_kernels)
        self.talk_before = self.talk_after = None
        if talking_heads:
            self.talk_before, self.talk_after = (
                nn.Parameter(torch.randn(self.num_heads, self.num_heads)) for _ in range(2)
            )

    @property
    def pair_bytes(self) -> int:
        """Scores and weights, without windows."""
        return 0 if self.has_windows else 8 * self.num_heads

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        if self.has_windows:
            return super().forward(x)
        self.check_input(x)
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in self.split_heads(self.qkv(x)))
        out = self._attend(q, k, v, x.shape[1:3], None)
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        regions: tuple[int, int],
        bias: Tensor | None = None,
        segments: Tensor | None = None,
        valid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attention inside the windows, [B, H, W, G, D], given as `visionzoo.kernels.routed_attention` has it."""
        padded, window = q.shape[1:3], (self.window_size, self.window_size)
        if valid_size is not None:
            rows, columns = (torch.arange(length, device=q.device) for length in padded)
            segments = ((rows >= valid_size[0])[:, None] | (columns >= valid_size[1])).int()
        if segments is not None:
            own = to_windows(segments[None, ..., None], window).flatten(1)  # [windows of a map, n]
            apart = own[:, :, None] != own[:, None]
            apart = torch.zeros_like(apart, dtype=torch.float32).masked_fill(apart, -torch.inf)
            apart = apart.repeat(q.shape[0], 1, 1).unsqueeze(1)  # [windows of all maps, 1, n, n]
            bias = apart if bias is None else apart + bias
        q, k, v = (
            to_windows(t.flatten(3), window).flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for t in (q, k, v)
        )
        out = self._attend(q, k, v, window, bias).transpose(1, 2).flatten(2).unflatten(1, window)
        return from_windows(out, padded).unflatten(3, (self.num_heads, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: Any, bias: Tensor | None) -> Tensor:
        talk = None if self.talk_before is None or self.talk_after is None else (self.talk_before, self.talk_after)
        return attend(q, k, v, bias=bias, factor=self.mixture(size), talk=talk)
