"""Which tokens of a pyramid lie in objects, and attention among the best of them: Focus-DETR, arXiv:2307.12612.

Facts from Focus-DETR/projects/focus_detr/modeling of https://github.com/huawei-noah/noah-research at aa0f80c (license
Apache-2.0); the code here is our own. The authors' has four levels and 300 tokens that attend to each other, this any
number of both, and fewer tokens where a pyramid has no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.part import Part
from visionzoo.layers.tokens import tokens_at
from visionzoo.layers.tracing import one_node
from visionzoo.text import count_of


class ForegroundScores(Part):
    """Score how likely the tokens of a pyramid lie in an object, from the coarsest level to the finest; O(N·C²).

    All levels share one predictor: a layer norm, a linear layer and GELU, the mean over the level in place of half of
    the channels, and an MLP. Before it, each level but the coarsest is added to itself times the enlarged scores of the
    next coarser one, times a learned factor. The scores have the dtype of the input or of autocast.

    Args:
        dim: channels C, a multiple of 4.
        num_levels: levels L.

    Raises:
        ValueError: if `dim` is no positive multiple of 4, or there is no level.

    >>> ForegroundScores(32, 2)(torch.zeros(1, 8 * 6 + 4 * 3, 32), [(8, 6), (4, 3)]).shape
    torch.Size([1, 60])
    """

    def __init__(self, dim: int, num_levels: int):
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"ForegroundScores: dim must be a positive multiple of 4, got {dim=}")
        if num_levels < 1:
            raise ValueError(f"ForegroundScores: expected one level or more, got {num_levels=}")
        self.dim, self.num_levels = dim, num_levels
        self.factors = nn.Parameter(torch.empty(num_levels - 1).uniform_(-0.3, 0.3))  # coarser levels first
        self.proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 1)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    @one_node  # it looks at shapes
    def forward(self, x: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return the logits [B, N] of tokens [B, N, C], which are the levels of these heights and widths, finest first.

        Raises:
            ValueError: if there are other levels, or the tokens are not theirs.
        """
        self.check_inputs("B N C", x, C=self.dim)
        tokens = [height * width for height, width in sizes]
        if len(sizes) != self.num_levels or sum(tokens) != x.shape[1]:
            raise ValueError(
                f"ForegroundScores: expected {count_of(self.num_levels, 'level')} with {x.shape[1]} tokens in all, "
                f"got sizes={list(sizes)}"
            )
        found: list[Tensor] = []
        coarser: Tensor | None = None
        for i, (level, size) in enumerate(reversed(list(zip(x.split(tokens, 1), sizes, strict=True)))):
            if coarser is not None:
                enlarged = F.interpolate(coarser, size, mode="bilinear", align_corners=True).flatten(2).mT
                level = level + level * enlarged * self.factors[i - 1]
            coarser = self._predict(level).mT.unflatten(2, size)
            found.insert(0, coarser.flatten(1))
        return torch.cat(found, 1)

    def _predict(self, x: Tensor) -> Tensor:
        own, shared = self.proj(x).chunk(2, -1)
        return self.mlp(torch.cat([own, shared.mean(1, keepdim=True).expand_as(own)], -1))


class BestTokensAttention(Part):
    """Self-attention among the tokens that score best, and a layer norm; O(K²·C + N·C) for K of N tokens.

    The other tokens stay as they are. The choice has no gradient.

    Args:
        dim: channels C.
        num_heads: heads.
        num_tokens: K; all tokens where there are fewer.
        dropout: of the attention's weights.

    Raises:
        ValueError: if the heads do not divide the channels, or no token is to attend.

    >>> BestTokensAttention(32, 4, num_tokens=5)(torch.zeros(1, 9, 32), torch.zeros(1, 9, 32), torch.rand(1, 9)).shape
    torch.Size([1, 9, 32])
    """

    def __init__(self, dim: int, num_heads: int, *, num_tokens: int = 300, dropout: float = 0.0):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"BestTokensAttention: num_heads must divide dim, got {dim=} and {num_heads=}")
        if num_tokens < 1:
            raise ValueError(f"BestTokensAttention: num_tokens must be 1 or more, got {num_tokens=}")
        self.dim, self.num_tokens = dim, num_tokens
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        nn.init.xavier_uniform_(self.attention.out_proj.weight)
        self.norm = nn.LayerNorm(dim)

    @one_node  # it looks at shapes
    def forward(self, x: Tensor, positions: Tensor, scores: Tensor) -> Tensor:
        """Return the tokens [B, N, C]; `positions` [B, N, C] are added to queries and keys, `scores` are [B, N]."""
        self.check_inputs("B N C, B N C, B N", x, positions, scores, any_dtype=True, C=self.dim)
        at = scores.topk(min(self.num_tokens, x.shape[1])).indices
        best = tokens_at(x, at)
        placed = best + tokens_at(positions, at)
        best = self.norm(best + self.attention(placed, placed, best, need_weights=False)[0])
        return with_tokens(x, at, best)


def with_tokens(x: Tensor, at: Tensor, tokens: Tensor) -> Tensor:
    """Put tokens [B, K, C] at the places [B, K], each another, of [B, N, C]."""
    return x.scatter(1, at.unsqueeze(-1).expand_as(tokens), tokens.to(x.dtype))


def foreground_targets(
    boxes: Tensor,
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    ranges: Sequence[tuple[float, float]],
) -> Tensor:
    """Say which tokens of a pyramid lie in an object of their level's size, [N].

    A token belongs to a box that it lies inside of, if the farthest side of the box is farther than the first number of
    the level's range, and not farther than the second.

    Args:
        boxes: of one image, [K, 4] as (x1, y1, x2, y2) in pixels.
        sizes: height and width of each level.
        strides: of the levels, in pixels.
        ranges: of the levels, in pixels.
    """
    found = []
    for size, stride, (above, most) in zip(sizes, strides, ranges, strict=True):
        y, x = (torch.arange(n, device=boxes.device, dtype=boxes.dtype) * stride + stride // 2 for n in size)
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)[:, None]
        sides = torch.cat([places - boxes[:, :2], boxes[:, 2:] - places], -1)  # [H·W, K, 4]
        farthest = sides.amax(-1)
        found.append(((sides.amin(-1) > 0) & (farthest > above) & (farthest <= most)).any(-1))
    return torch.cat(found)


def foreground_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the focal loss (alpha 1/4, gamma 2) of logits [B, N] for targets [B, N], over the objects' tokens.

    Each image's sum is divided by the number of its tokens in objects, 1 at least; the mean is over images.
    """
    with without_autocast(logits.device):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = sigmoid_focal_loss(logits, targets.to(logits.dtype), alpha=0.25, gamma=2.0)
        return (losses.sum(1) / targets.sum(1).clamp(min=1)).mean()
