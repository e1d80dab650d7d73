"""Pooling of three reaches in place of attention (PoNet, arXiv:2110.02442), on maps."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.layers.attention import attend
from visionzoo.layers.mixers.base import Mixer


class MultiPoolMixer(Mixer):
    """What the whole map, a segment of it and the neighbours say, pooled, and weighted by the token itself.

        yᵢ = W((g + sᵢ) ⊙ oᵢ + lᵢ)

    Time: O(N·C²); memory: O(N·C).

    g, of all tokens, is attention of their mean query to the keys, which are the values, too; s is the maximum over the
    token's segment, l over its neighbourhood, o a projection of the token. Mean and softmax are float32 at least.

    Segments are windows of (⌊H/S⌋ + 1)·(⌊W/S⌋ + 1) tokens, the last ones smaller; a map of one row has those of the
    paper, whose tokens are a sequence. Facts from https://github.com/lxchtan/PoNet at cc9a29a (Apache-2.0); windows and
    square neighbourhoods are ours.

    Args:
        dim: channels C.
        num_heads: heads of the attention of the mean.
        segments: S along height and width, or (of the height, of the width); at most.
        pool_size: side of the neighbourhood, odd.

    Raises:
        ValueError: if the heads do not divide the channels, segments are not positive, or the neighbourhood's side is
            even.

    >>> import torch
    >>> MultiPoolMixer(64)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        segments: int | tuple[int, int] = 8,
        pool_size: int = 3,
    ):
        super().__init__(dim, num_heads)
        self.check_kernels(pool_size=pool_size)
        self.segments = to_2tuple(segments)
        if min(self.segments) < 1:
            raise ValueError(f"MultiPoolMixer: segments must be positive, got {segments=}")
        self.pool_size = pool_size
        self.in_proj = nn.Linear(dim, 5 * dim)  # query, key, the token's own, neighbourhood, segment
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        query, key, own, local, segment = self.in_proj(x).chunk(5, -1)
        heads = (self.num_heads, self.head_dim)
        key = key.flatten(1, 2).unflatten(-1, heads).transpose(1, 2)  # [B, G, N, D]
        mean = query.mean((1, 2)).unflatten(-1, heads).unsqueeze(2)  # [B, G, 1, D]
        whole = attend(mean, key, key).flatten(1)[:, None, None]
        padding = self.pool_size // 2
        near = F.max_pool2d(local.permute(0, 3, 1, 2), self.pool_size, stride=1, padding=padding).permute(0, 2, 3, 1)
        return self.proj((whole + self._of_segments(segment)) * own + near)

    def _of_segments(self, x: Tensor) -> Tensor:
        """Give each token of [B, H, W, C] the maximum of its segment."""
        height, width = x.shape[1:3]
        rows, columns = height // self.segments[0] + 1, width // self.segments[1] + 1
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows), value=float("-inf"))
        windows = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))  # [B, H/rows, rows, W/columns, columns, C]
        most = windows.amax((2, 4), keepdim=True).expand_as(windows)
        return most.flatten(3, 4).flatten(1, 2)[:, :height, :width]
