"""Swin's downsampling: four neighbors become one token (arXiv:2103.14030)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from visionzoo.layers.arguments import Positive
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_multiple
from visionzoo.layers.part import Part


class PatchMerge(Part):
    """Concatenate 2×2 neighbors, normalize, project; maps of odd size are padded with zeros at the bottom and right.

    Args:
        in_dim: channels in.
        out_dim: channels out.
        norm_layer: called with 4·in_dim.
    """

    def __init__(self, in_dim: Positive, out_dim: Positive, norm_layer: Callable[[int], nn.Module] = LayerNorm):
        super().__init__()
        self.in_dim = in_dim
        self.norm = norm_layer(4 * in_dim)
        self.reduction = nn.Linear(4 * in_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, ⌈H/2⌉, ⌈W/2⌉, out_dim]."""
        self.check_inputs("B H W C", x, C=self.in_dim)
        x = pad_to_multiple(x, (2, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H/2, 2, W/2, 2, C]
        # as released, the neighbors come column by column: the one below is the second, the one to the right the third
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))
