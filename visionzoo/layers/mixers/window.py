"""Attention inside square windows (DaViT, arXiv:2204.03645), also shifted and with position bias (Swin, 2103.14030)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.kernels import routed_attention
from visionzoo.kernels.regions import from_regions, to_regions, valid_tokens
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.padding import crop, pad_to_multiple
from visionzoo.layers.position import RelativePositionBias


class WindowMixer(Mixer):
    """Tokens attend to the tokens of their window; softmax in float32 at least.

        yᵢ = Σ over i's window of softmaxⱼ(qᵢ·kⱼ / √D + b(j - i)) vⱼ

    Time: O(N·w²·C); memory: O(N·C) in kernels, else O(N·w²·G).

    A map that the window does not divide is padded with zeros at the bottom and right before the projection to
    q, k, v. As released the padded tokens take part in attention (their keys and values are the biases).

    Shifted windows start `shift_size` tokens further down and right; the rows and columns before them form windows
    with those left over at the other border, in which tokens from different borders do not see each other.

    Facts from https://github.com/dingmyu/davit at fc79470 (MIT) and https://github.com/microsoft/Swin-Transformer at
    f82860b (MIT).

    Args:
        dim: channels C.
        num_heads: attention heads.
        window_size: side w of the windows, in tokens.
        shift_size: from 0 to w - 1; None means half a window.
        relative_position_bias: add a learned number for each offset between query and key and each head.
        qkv_bias: whether the projection to q, k, v has a bias.
        kv_heads: heads of keys and values, see `Mixer`.
        mask_padding: leave padded tokens out of attention instead.
        head_dim: width of a head; None means C / num_heads.
        unshifted: where nothing is shifted: along an "axis" that is one window at most; along both axes of a "map" of
            which one is, as in Swin's classifier; "none": all maps are shifted, as in Swin's dense backbones.

    Raises:
        ValueError: if window, shift or `unshifted` are not as described.

    >>> import torch
    >>> WindowMixer(64, 2, window_size=4, shift_size=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    RELAXES = QUANTIZES = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: int = 7,
        shift_size: int | None = 0,
        relative_position_bias: bool = False,
        qkv_bias: bool = True,
        mask_padding: bool = False,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        unshifted: str = "axis",
    ):
        super().__init__(dim, num_heads, head_dim=head_dim, kv_heads=kv_heads)
        if unshifted not in ("axis", "map", "none"):
            raise ValueError(f"{type(self).__name__}: unshifted must be 'axis', 'map' or 'none', got {unshifted=}")
        if window_size < 1:
            raise ValueError(f"{type(self).__name__}: window_size must be positive, got {window_size=}")
        if shift_size is None:
            shift_size = window_size // 2
        if not 0 <= shift_size < window_size:
            raise ValueError(
                f"{type(self).__name__}: shift_size must be from 0 to {window_size - 1}, got {shift_size=}"
            )
        self.window_size = window_size
        self.shift_size = shift_size
        self.mask_padding = mask_padding
        self.unshifted = unshifted
        inner_dim = self.num_heads * self.head_dim
        self.qkv = nn.Linear(dim, self.qkv_dim, bias=qkv_bias)
        self.relative_position_bias = (
            RelativePositionBias(self.num_heads, window_size) if relative_position_bias else None
        )
        self.proj = nn.Linear(inner_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        size = height, width = x.shape[1:3]
        x = pad_to_multiple(x, (self.window_size, self.window_size))
        padded = x.shape[1:3]
        shift = self._shift(size)
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        q, k, v = self.split_heads(self.qkv(x))
        out = self.attention(
            q,
            k,
            v,
            regions=(padded[0] // self.window_size, padded[1] // self.window_size),
            bias=None if self.relative_position_bias is None else self.relative_position_bias(),
            segments=self._segments(size, padded, shift, x.device) if any(shift) else None,
            valid_size=(height, width) if self.mask_padding and not any(shift) else None,
        ).flatten(3)
        if any(shift):
            out = out.roll(shift, (1, 2))
        return self.proj(crop(out, size))

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
        """Attention inside the windows, [B, H, W, G, D]; options are those of `visionzoo.kernels.routed_attention`."""
        seen: dict[str, Any] = {"regions": regions, "segments": segments, "valid_size": valid_size}
        if self.products is not None:
            size = (q.shape[1], q.shape[2])
            windows = (to_regions(t, regions).transpose(2, 3) for t in (q, k, v))  # [B, R, G, n, D]
            seen_bias = _seen_bias(bias, size, **seen)
            out = from_regions(self.products(*windows, seen_bias).transpose(2, 3), regions, size)
        else:
            out = routed_attention(q, k, v, None, bias=bias, **seen)
        return self.relax(out, lambda: routed_attention(torch.zeros_like(q), k, v, None, **seen))

    def _shift(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return how far a map of this size is shifted along each axis."""
        if not self.shift_size or self.unshifted == "none":
            return (self.shift_size,) * 2
        large = [length > self.window_size for length in size]
        if self.unshifted == "map":
            large = [all(large)] * 2
        return tuple(self.shift_size if each else 0 for each in large)

    def _segments(self, size: Sequence[int], padded: Sequence[int], shift: Sequence[int], device) -> Tensor:
        """Numbers [H, W] of the parts of a shifted map that are no neighbors in the map itself."""
        rows, columns = (torch.arange(length, device=device) for length in padded)
        wrapped_rows, wrapped_columns = rows >= padded[0] - shift[0], columns >= padded[1] - shift[1]
        segments = 2 * wrapped_rows[:, None] + wrapped_columns
        if self.mask_padding:
            rows, columns = (rows + shift[0]) % padded[0], (columns + shift[1]) % padded[1]  # before the shift
            segments = segments.masked_fill((rows >= size[0])[:, None] | (columns >= size[1]), 4)
        return segments


def _seen_bias(
    bias: Tensor | None,
    size: tuple[int, int],
    regions: tuple[int, int],
    segments: Tensor | None,
    valid_size: tuple[int, int] | None,
) -> Tensor | None:
    """Return the bias of scores [B, R, G, n, n] with what hides tokens in it; the arguments are `attention`'s."""
    if segments is not None:
        parts = to_regions(segments[None], regions)[0]  # [R, n]
        hidden = (parts[:, :, None] != parts[:, None])[:, None]
    elif valid_size is not None:
        hidden = ~valid_tokens(size, valid_size, regions, bias.device if bias is not None else None)[:, None, None]
    else:
        return bias
    bias = torch.zeros((), device=hidden.device) if bias is None else bias
    return bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
