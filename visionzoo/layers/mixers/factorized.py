"""Factorized self-attention: global keys at the cost of windows (FaViT, arXiv:2312.08614)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionzoo.layers.attention import attend
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_size
from visionzoo.layers.tracing import larger, one_node


class FactorizedMixer(Mixer):
    """An eighth of the channels attends to a reduced map, the others to 7×7 places, each averaged over all windows.

        y = [attention to windows at steps r and 1, attention to the r-reduced map]

    Time: O(N·C² + N·w²·C + N²·C/8r²); memory: O(N·C).

    Softmax is float32 at least. The local channels are in two groups whose windows are
    w×w tokens, side by side in the first and r apart in the second; with r = 1 there is one group. Maps are continued
    to whole windows by reflection, repeatedly where they are smaller than a window. As released, the average over the
    windows is one over stretches of (window, channel), channels last, so it mixes channels unless there is one window.
    The reduced map takes no rows and columns after the last whole patch, as released; a map smaller than a patch is
    padded with zeros to one.

    Facts from https://github.com/q2479036243/FaViT at 529b46b (no license).

    Args:
        dim: channels C. The local groups have the largest multiples of `num_heads` in 7·C/16 each (7·C/8 where there
            is one), which are the authors' where those divide C.
        num_heads: heads of the local channels; the global ones have one.
        reduction: side r of the patches of the reduced map, and step between tokens of a window of the second group.
        window_size: side w of the windows, in tokens.
        qkv_bias: whether the linear layers before attention have a bias.

    Raises:
        ValueError: if a number is not positive, or there are fewer local channels than heads.

    >>> import torch
    >>> FactorizedMixer(64, 2, reduction=2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        reduction: int = 1,
        window_size: int = 7,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        if reduction < 1 or window_size < 1:
            raise ValueError(
                f"FactorizedMixer: reduction and window_size must be positive, got {reduction=} and {window_size=}"
            )
        self.window_size = window_size
        self.reduction = reduction
        self.dilations = (1, reduction) if reduction > 1 else (1,)
        self.width = 7 * dim // (8 * len(self.dilations)) // self.num_heads  # of a head of a local group
        if self.width == 0:
            raise ValueError(
                f"FactorizedMixer: each head needs more channels, got {dim=} and num_heads={self.num_heads}"
            )
        group = self.num_heads * self.width
        self.local_dim = len(self.dilations) * group
        self.global_dim = dim - self.local_dim
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.sr = ConvNorm(self.global_dim, self.global_dim, reduction, reduction, norm_layer=LayerNorm)
        self.global_kv = nn.Linear(self.global_dim, 2 * self.global_dim, bias=qkv_bias)
        self.global_conv = DepthwiseConvNHWC(self.global_dim, 3)
        self.local_kv = nn.Sequential(DepthwiseConvNHWC(self.local_dim, 3), nn.Linear(self.local_dim, self.local_dim))
        groups = range(len(self.dilations))
        self.local_fc1 = nn.ModuleList(nn.Linear(self.width, self.width, bias=qkv_bias) for _ in groups)
        self.local_fc2 = nn.ModuleList(nn.Linear(self.width, 2 * self.width, bias=qkv_bias) for _ in groups)
        self.local_conv = nn.ModuleList(DepthwiseConvNHWC(group, 3) for _ in groups)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        parts = [self.global_dim, self.local_dim]
        (q_global, q_local), (x_global, x_local) = (t.split(parts, dim=-1) for t in (self.q(x), x))
        out = [self._attend_globally(q_global, x_global)]
        queries = q_local.unflatten(-1, (self.num_heads, -1)).chunk(len(self.dilations), dim=-1)
        maps = self.local_kv(x_local).chunk(len(self.dilations), dim=-1)
        for i, (q, kv) in enumerate(zip(queries, maps, strict=True)):
            out.append(self._attend_locally(i, q, kv))
        return self.proj(torch.cat(out, dim=-1))

    def _attend_globally(self, q: Tensor, x: Tensor) -> Tensor:
        x = self.sr(pad_to_size(x, (self.reduction, self.reduction)))
        k, v = self.global_kv(x).chunk(2, dim=-1)
        v = self.global_conv(v, residual=v)
        out = attend(q.flatten(1, 2).unsqueeze(1), k.flatten(1, 2).unsqueeze(1), v.flatten(1, 2).unsqueeze(1))
        return out.squeeze(1).unflatten(1, q.shape[1:3])

    def _attend_locally(self, i: int, q: Tensor, x: Tensor) -> Tensor:
        """Attend from [B, H, W, G, D] to the places of the windows of a map [B, H, W, G·D]."""
        x = _windows(x, self.window_size, self.dilations[i])
        x = x.unflatten(-1, (self.num_heads, -1))  # [B, h, w, h, w, G, D]
        x = x.permute(0, 5, 2, 4, 1, 3, 6).flatten(4).flatten(2, 3)  # [B, G, w², windows · D]
        x = x.unflatten(3, (self.width, -1)).mean(4)  # stretches as long as there are windows, as released
        k, v = self.local_fc2[i](self.local_fc1[i](x)).chunk(2, dim=-1)
        places = v.transpose(1, 2).flatten(2).unflatten(1, (self.window_size, self.window_size))
        v = self.local_conv[i](places, residual=places).flatten(1, 2)
        v = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out = attend(q.flatten(1, 2).transpose(1, 2), k, v)
        return out.transpose(1, 2).flatten(2).unflatten(1, q.shape[1:3])


@one_node
def _windows(x: Tensor, size: int, step: int) -> Tensor:
    """Cut a map [B, H, W, C] into windows [B, rows, size, columns, size, C] of tokens `step` apart, side by side.

    Beyond its end the map is reflected.
    """
    span = step * (size - 1) + 1
    for axis in (1, 3):
        length = x.shape[axis]
        count = (length + span - 1) // span
        places = span * torch.arange(count, device=x.device)[:, None] + step * torch.arange(size, device=x.device)
        period = larger(1, 2 * (length - 1))
        back: Tensor = places.flatten() % period
        x = x.index_select(axis, torch.minimum(back, period - back)).unflatten(axis, (-1, size))
    return x
