"""Branches of tokens that see an image at several scales and exchange class tokens (CrossViT, arXiv:2103.14899)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn

from visionzoo.layers.arguments import Positive, Share
from visionzoo.layers.attention import attend
from visionzoo.layers.nhwc import on_nhwc
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_multiple
from visionzoo.layers.part import Part
from visionzoo.layers.tokens import Tokens, map_size
from visionzoo.layers.tracing import one_node, replaced

_Norm = partial(LayerNorm, eps=1e-6)


def view_size(size: tuple[int, int], ratio: tuple[int, int]) -> tuple[int, int]:
    """Multiply height and width by the fraction `ratio`, rounded to the nearest."""
    above, below = ratio
    return (size[0] * above + below // 2) // below, (size[1] * above + below // 2) // below


@one_node  # it looks at the size of the image
def resize_view(image: Tensor, ratio: tuple[int, int]) -> Tensor:
    """Resize an image [B, C, H, W] by the fraction `ratio` (bicubic), in float32 at least."""
    if ratio[0] == ratio[1]:
        return image
    size = view_size((image.shape[2], image.shape[3]), ratio)
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="bicubic", align_corners=False).to(image.dtype)


class BranchStems(Part, nn.ModuleList):
    """A stem for each branch, on its own view of the image, padded with zeros to whole patches.

    Args:
        stems: [B, in_chans, H, W] to a map [B, C, H', W'] each.
        patch_sizes: side of the patches of each.
        ratios: size of each view over that of the image, as fractions.
    """

    def __init__(self, stems: Sequence[nn.Module], patch_sizes: Sequence[int], ratios: Sequence[tuple[int, int]]):
        super().__init__(stems)
        self.patch_sizes, self.ratios = tuple(patch_sizes), tuple(ratios)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image [B, in_chans, H, W] to a map [B, C, H', W'] for each branch."""
        self.check_inputs("B C H W", image)
        maps = []
        for stem, side, ratio in zip(self, self.patch_sizes, self.ratios, strict=True):
            pad = partial(pad_to_multiple, multiple=(side, side))
            maps.append(stem(on_nhwc(pad, resize_view(image, ratio))))
        return tuple(maps)

    def map_sizes(self, img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Return height and width of each branch's map of an image of this size in pixels."""
        size = to_2tuple(img_size)
        return [
            map_size(view_size(size, ratio), side) for ratio, side in zip(self.ratios, self.patch_sizes, strict=True)
        ]


class ClassTokenFusion(Part):
    """A branch's class token attends to another branch's map, in that branch's width.

    Args:
        dim: channels C of the token.
        other_dim: channels C' of the other branch.
        num_heads: attention heads.
        qkv_bias: whether the projections to q, k, v have a bias.
        drop_path: probability with which a sample skips the attention in training.
    """

    def __init__(
        self, dim: Positive, other_dim: Positive, num_heads: Positive, *, qkv_bias: bool = True, drop_path: Share = 0.0
    ):
        super().__init__()
        self.dim, self.other_dim, self.num_heads = dim, other_dim, num_heads
        self.enter = nn.Sequential(_Norm(dim), nn.GELU(), nn.Linear(dim, other_dim))
        self.norm = _Norm(other_dim)
        self.q = nn.Linear(other_dim, other_dim, bias=qkv_bias)
        self.kv = nn.Linear(other_dim, 2 * other_dim, bias=qkv_bias)
        self.proj = nn.Linear(other_dim, other_dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.leave = nn.Sequential(_Norm(other_dim), nn.GELU(), nn.Linear(other_dim, dim))

    def forward(self, own: Tokens, other: Tokens) -> Tokens:
        """Return `own` with another class token; its map stays."""
        self.check_inputs("B N C, B M D", own.x, other.x, C=self.dim, D=self.other_dim)
        token = self.enter(own.x[:, :1])
        x = self.norm(torch.cat([token, other.x[:, other.prefix :]], 1))
        q = self.q(x[:, :1]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, G, 1 + N, D]
        token = token + self.drop_path(self.proj(attend(q, k, v).transpose(1, 2).flatten(2)))
        return replaced(own, x=torch.cat([self.leave(token), own.x[:, 1:]], 1))


class MultiScaleBlock(nn.Module):
    """Blocks of each branch by itself, then the fusion of their class tokens, each with what was before any.

    Args:
        branches: blocks of each branch.
        fusion: of each branch's class token with the other's map.
    """

    def __init__(self, branches: Sequence[Sequence[nn.Module]], fusion: Sequence[nn.Module]):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*blocks) for blocks in branches)
        self.fusion = nn.ModuleList(fusion)

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks of the branches, one branch after the other."""
        return [block for branch in self.branches for block in branch.children()]

    def forward(self, state: tuple[Tokens, ...]) -> tuple[Tokens, ...]:
        """Take the tokens of the branches through the block; their numbers and sizes stay."""
        state = tuple(branch(tokens) for branch, tokens in zip(self.branches, state, strict=True))
        return tuple(
            fuse(state[i], state[1 - i]) if isinstance(fuse, ClassTokenFusion) else state[i]  # else it was pruned
            for i, fuse in enumerate(self.fusion)
        )
