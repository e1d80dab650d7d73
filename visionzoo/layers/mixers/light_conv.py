"""Convolutions whose kernels are softmaxes over taps: lightweight and dynamic convolution (arXiv:1901.10430)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.kernels import depthwise_conv
from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.mixers.dynamic_local import convolve_by_place


class LightConvMixer(Mixer):
    """A gated linear unit, a depthwise convolution whose kernel is a softmax over its taps, a linear layer.

        yₚ = W₂ Σₒ softmaxₒ(w)ₒ uₚ₊ₒ, u = GLU(W₁ x), w learned or W uₚ

    Time: O(N·C·(C + k)) for windows of k places; memory: O(N·C), with `dynamic` O(N·(C + G·k)).

    The sum is over the offsets o of the window, with zeros around the map; the channels of a head share w. Lightweight
    convolution learns w, dynamic convolution makes it at each place, w = W uₚ. The softmax and sums over the window are
    float32 at least, the rest in the dtype of the input or of autocast.

    Wu et al., ICLR 2019. Facts from https://github.com/facebookresearch/fairseq at 3d262bb (MIT), the class
    `LightConvEncoderLayer` with `LightweightConv1dTBC` or `DynamicConv1dTBC`. Theirs is along a sequence: that is a
    kernel of (1, k) on a map of one row. The window in two dimensions is ours; its softmax also counts taps beyond the
    map, so that k × k on one row is another function, unless `renorm_padding` leaves such taps out. Weight dropout is
    that of their CUDA layers: without `dynamic` it takes the taps of all places at once. Even kernels, causal padding
    and filters made from another input (`query_size`, `in_proj`) are left out.

    Args:
        dim: channels C.
        num_heads: heads G, of C/G channels in turn that share taps.
        kernel_size: sides of the window, odd: one, or (height, width).
        dynamic: make the taps at each place; otherwise they are learned.
        weight_softmax: normalize the taps; otherwise they are taken as they are.
        renorm_padding: leave taps beyond the map out of the softmax; with `dynamic` and `weight_softmax` only.
        glu: W₁ gives 2·C channels, half of them multiplied by the sigmoid of the others; otherwise C.
        conv_bias: add a learned bias of each channel to the convolution.
        weight_dropout: share of normalized taps that training sets to zero, from 0 to below 1.

    Raises:
        ValueError: if the heads do not divide the channels, a side is even, or an option is out of its range.

    >>> import torch
    >>> LightConvMixer(64, 4, dynamic=True)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        kernel_size: int | tuple[int, int] = 7,
        dynamic: bool = False,
        weight_softmax: bool = True,
        renorm_padding: bool = False,
        glu: bool = True,
        conv_bias: bool = False,
        weight_dropout: float = 0.0,
    ):
        super().__init__(dim, num_heads)
        height, width = to_2tuple(kernel_size)
        self.check_kernels(**{"kernel_size[0]": height, "kernel_size[1]": width})
        if renorm_padding and not (dynamic and weight_softmax):
            raise ValueError(
                f"LightConvMixer: renorm_padding is for dynamic=True with weight_softmax=True, got {dynamic=} and "
                f"{weight_softmax=}"
            )
        if not 0 <= weight_dropout < 1:
            raise ValueError(f"LightConvMixer: weight_dropout must be from 0 to below 1, got {weight_dropout=}")
        self.kernel_size = (height, width)
        self.weight_softmax, self.renorm_padding, self.glu = weight_softmax, renorm_padding, glu
        self.weight_dropout = weight_dropout
        self.in_proj = nn.Linear(dim, 2 * dim if glu else dim)
        self.to_weights = nn.Linear(dim, self.num_heads * height * width, bias=False) if dynamic else None
        weight = None if dynamic else nn.init.xavier_uniform_(torch.empty(self.num_heads, 1, height, width))
        self.weight = None if weight is None else nn.Parameter(weight)
        self.conv_bias = nn.Parameter(torch.zeros(dim)) if conv_bias else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        x = self.in_proj(x)
        if self.glu:
            x = F.glu(x)
        if self.to_weights is not None:
            taps = self.to_weights(x).unflatten(-1, (self.num_heads, -1))  # [B, H, W, G, k]
            out = convolve_by_place(x, self._normalized(taps, (x.shape[1], x.shape[2])), self.kernel_size)
        else:
            assert self.weight is not None
            out = self._convolve(x, self._normalized(self.weight.flatten(1)))
        return self.proj(out if self.conv_bias is None else out + self.conv_bias.to(out.dtype))

    def _normalized(self, taps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return what [..., G, k] taps weigh, float32 at least; `size` is that of the map if each place has its own."""
        taps = taps.to(torch.promote_types(taps.dtype, torch.float32))
        if self.renorm_padding:
            assert size is not None
            around = [side // 2 for side in self.kernel_size for _ in range(2)][::-1]
            inside = F.pad(torch.ones(size, dtype=torch.bool, device=taps.device), around)
            inside = inside.unfold(0, self.kernel_size[0], 1).unfold(1, self.kernel_size[1], 1).flatten(2)
            taps = taps.masked_fill(~inside.unsqueeze(2), float("-inf"))
        if self.weight_softmax:
            taps = taps.softmax(-1)
        return F.dropout(taps, self.weight_dropout, self.training)

    def _convolve(self, x: Tensor, weights: Tensor) -> Tensor:
        """Convolve each channel with the taps of its head, weights [G, k]."""
        height, width = self.kernel_size
        kernel = weights.unflatten(-1, (1, height, width)).repeat_interleave(self.dim // self.num_heads, 0)
        if height == width:
            return depthwise_conv(x, kernel.to(x.dtype))
        with without_autocast(x.device):
            wide = x.to(kernel.dtype).permute(0, 3, 1, 2)
            out = F.conv2d(wide, kernel, padding=(height // 2, width // 2), groups=self.dim)
        return out.permute(0, 2, 3, 1).to(x.dtype)
