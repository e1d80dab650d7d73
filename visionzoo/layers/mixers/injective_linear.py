"""Injective linear attention with a predicted local residual (InLine, arXiv:2412.06590)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.padding import crop, from_windows, neighbours, pad_to_multiple, to_windows


class InjectiveLinearMixer(Mixer):
    """Linear attention whose weights are shifted to a sum of 1, not divided by it, and a 3×3 convolution of v.

        yᵢ = v̄ + s/N·φ(qᵢ)·Σⱼ (φ(kⱼ) - mean φ(k)) vⱼᵀ + conv(v)

    Time: O(N·C·D); memory: O(N·C).

    With N keys the weight of key j is s/N·φ(q)·φ(kⱼ) - s/N·φ(q)·φ(k̄) + 1/N, s the inverse root of the heads' width,
    so the output is v̄ + s/N·φ(q)·Σⱼ (φ(kⱼ) - mean φ(k))·vⱼᵀ. The convolution's
    kernels, one for each sample and channel, are predicted from the mean of the map. Prefix tokens take part in all but
    the convolutions. Features, sums and states are float32 at least, whatever the input.

    Facts from https://github.com/LeapLabTHU/InLine at e463a6f (no licence).

    Args:
        dim: channels C.
        num_heads: attention heads, also groups of the layers that predict the kernels.
        feature_map: φ: "identity", as in all released models, "relu", "leaky_relu" or "exp" (of 0.2 x).
        window_size: attend inside windows of this side, each with means and a convolution of its own; None for the
            whole map. Longer sides of a map are padded with zeros to whole windows, which take part.
        shift_size: how much further down and right windows start; as released the parts that are no neighbours are
            not kept apart. Along an axis where the map is one window at most, nothing is shifted.
        lepe_kernel: kernel, odd, of a learned depthwise convolution of v that is added; None for none.
        sees_input: in a `Block` predict from the mean of its input, before the norm, as in CSWin.
        qkv_bias: whether the projection to q, k, v has a bias.

    Raises:
        ValueError: if the feature map is unknown, a kernel even, or a size not as said.

    >>> import torch
    >>> InjectiveLinearMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda x: x,
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "exp": lambda x: (0.2 * x).exp(),
    }

    needs_map_size = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        feature_map: str = "identity",
        window_size: int | None = None,
        shift_size: int = 0,
        lepe_kernel: int | None = None,
        sees_input: bool = False,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        self.check_kernels(lepe_kernel=lepe_kernel)
        if feature_map not in self.FEATURE_MAPS:
            raise ValueError(
                f"InjectiveLinearMixer: unknown {feature_map=}, expected one of {tuple(self.FEATURE_MAPS)}"
            )
        if (window_size is not None and window_size < 1) or not 0 <= shift_size < (window_size or 1):
            raise ValueError(
                f"InjectiveLinearMixer: window_size must be positive or None and shift_size from 0 to below it, got "
                f"{window_size=} and {shift_size=}"
            )
        self.feature_map = feature_map
        self.window_size = window_size
        self.shift_size = shift_size
        self.sees_input = sees_input
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=self.num_heads),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=self.num_heads),
        )
        self.lepe = DepthwiseConvNHWC(dim, lepe_kernel) if lepe_kernel else None
        self.proj = nn.Linear(dim, dim)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes, but for windows, which they are in none of."""
        return self.window_size is None

    def forward(self, x: Tensor, unnormed: Tensor | None = None, *, map_size: tuple[int, int] | None = None) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]; `unnormed` is x before the norm, used where the mixer `sees_input`.

        With `map_size` (H, W) x is [B, 1, P + H·W, C]: P prefix tokens, then those of the map.
        """
        self.check_input(x)
        source = x if unnormed is None else unnormed
        if self.window_size is None:
            return self.proj(self._attend(x, source, map_size))
        size = x.shape[1:3]
        window = (min(self.window_size, size[0]), min(self.window_size, size[1]))
        shift = [self.shift_size if length > self.window_size else 0 for length in size]
        x, source = (pad_to_multiple(t, window).roll((-shift[0], -shift[1]), (1, 2)) for t in (x, source))
        out = from_windows(self._attend(to_windows(x, window), to_windows(source, window)), x.shape[1:3])
        return self.proj(crop(out.roll((shift[0], shift[1]), (1, 2)), size))

    def _attend(self, x: Tensor, source: Tensor, map_size: tuple[int, int] | None = None) -> Tensor:
        qkv = self.qkv(x)
        kernels = self.residual(source.mean((1, 2)).to(x.dtype).unsqueeze(-1)).view(-1, 1, 1, self.dim, 9).unbind(-1)
        q, k, v = qkv.chunk(3, dim=-1)
        phi = self.FEATURE_MAPS[self.feature_map]
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        with without_autocast(x.device):
            # [B, H, W, C] -> [B, G, N, D]
            heads = (self.num_heads, self.head_dim)
            q_heads, k_heads, v_heads = (
                t.to(dtype).unflatten(-1, heads).flatten(1, 2).transpose(1, 2) for t in (phi(q), phi(k), v)
            )
            k_heads = k_heads - k_heads.mean(2, keepdim=True)
            state = k_heads.mT @ v_heads * (self.head_dim**-0.5 / k_heads.shape[2])
            out = q_heads @ state + v_heads.mean(2, keepdim=True)
            out = out.transpose(1, 2).reshape(x.shape)
            prefix = None
            if map_size is not None:
                count = x.shape[2] - map_size[0] * map_size[1]
                prefix, out = out[:, :, :count], out[:, 0, count:].unflatten(1, map_size)
                v = v[:, 0, count:].unflatten(1, map_size)
            for place, kernel in zip(neighbours(v), kernels, strict=True):
                out = torch.addcmul(out, place.to(dtype), kernel.to(dtype))
        out = out.to(qkv.dtype)
        out = out if self.lepe is None else self.lepe(v, residual=out)
        return out if prefix is None else torch.cat([prefix.to(qkv.dtype), out.flatten(1, 2).unsqueeze(1)], 2)
