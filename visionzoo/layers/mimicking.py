"""What ScaleKD learns features by: a cross-attention projector, and losses of maps in two views (arXiv:2411.06786).

NeurIPS 2024. Facts from https://github.com/deep-optimization/ScaleKD at 478a7db (Apache-2.0), mmcls/models/dis_losses;
the code here is our own, and equal to theirs in float64. Where we differ: maps need not be square, and the view of
frequencies has no transform. Theirs takes the discrete cosine transform of each channel, sets the coefficient of
frequency 0 to zero and transforms back: that takes the mean over the map away, which is what is done here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from visionzoo.layers.attention import attend
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.part import Part
from visionzoo.layers.tracing import one_node

SHARPNESS = 5.0  # factor of the scores of attention
SPATIAL, FREQUENCY = 0.08, 0.06  # weights of the two views in the loss


class CrossAttentionProjector(Part):
    """Brings a student's map to the places and channels of a teacher's: queries there attend to the student's tokens.

    Complexity is that of attention of H·W queries to h·w keys. Sums are float32 at least.

    Args:
        dim: the student's channels c.
        out_dim: the teacher's channels C.
        size: height and width (h, w) of the student's map.
        out_size: height and width (H, W) of the teacher's map.
        num_heads: of attention; divides `out_dim`.
        own_query: learn a query for each of the teacher's places; else `forward` takes them.

    Raises:
        ValueError: if a size is not positive, or the heads do not divide the channels.

    >>> CrossAttentionProjector(8, 16, (2, 3), (4, 6), num_heads=4)(torch.randn(2, 8, 2, 3)).shape
    torch.Size([2, 4, 6, 16])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        size: tuple[int, int],
        out_size: tuple[int, int],
        *,
        num_heads: int = 8,
        own_query: bool = True,
    ):
        super().__init__()
        if min(dim, out_dim, *size, *out_size) < 1:
            raise ValueError(
                f"CrossAttentionProjector: channels and sizes must be positive, got {dim=}, {out_dim=}, {size=}, "
                f"{out_size=}"
            )
        if num_heads < 1 or out_dim % num_heads:
            raise ValueError(f"CrossAttentionProjector: num_heads must divide {out_dim=}, got {num_heads=}")
        self.dim, self.out_dim, self.num_heads = dim, out_dim, num_heads
        self.size, self.out_size = tuple(size), tuple(out_size)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.bn = nn.BatchNorm2d(dim)
        self.positions = nn.Parameter(torch.zeros(1, dim, *size))
        trunc_normal_(self.positions, std=0.02)
        self.register_parameter("query", None)
        if own_query:
            self.query = nn.Parameter(torch.randn(out_size[0] * out_size[1], out_dim))
        self.query_proj = nn.Linear(out_dim, out_dim)
        self.q = nn.Linear(out_dim, out_dim)
        self.k = nn.Linear(dim, out_dim)
        self.v = nn.Linear(dim, out_dim)
        self.proj = nn.Linear(out_dim, out_dim)
        self.norm = LayerNorm(out_dim)
        self.mlp = Mlp(out_dim, 4 * out_dim, act_layer=nn.ReLU)

    @one_node  # it looks at shapes
    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Student's map [B, c, h, w], and queries [B, H, W, C] where none are learned, to a map [B, H, W, C].

        Raises:
            ValueError: if the map is of another size or width, or there are no queries.
        """
        if x.shape[1:] != (self.dim, *self.size):
            raise ValueError(
                f"CrossAttentionProjector: expected a map [B, {self.dim}, {self.size[0]}, {self.size[1]}], got "
                f"{tuple(x.shape)}"
            )
        if query is None and self.query is None:
            raise ValueError("CrossAttentionProjector: it was built without queries of its own; pass query=")
        self.check_inputs("B C H W", x)
        if query is not None:
            height, width = self.out_size
            self.check_inputs("B H W C", query, B=x.shape[0], H=height, W=width, C=self.out_dim)
        tokens = (F.relu(self.bn(self.conv(x))) + self.positions).flatten(2).transpose(1, 2)
        places = self.query.expand(x.shape[0], -1, -1) if query is None else query.flatten(1, 2)
        q, k, v = (
            layer(given).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, given in ((self.q, F.relu(self.query_proj(places))), (self.k, tokens), (self.v, tokens))
        )
        out = attend(q, k, v, scale=SHARPNESS * q.shape[-1] ** -0.5)
        out = self.norm(self.proj(out.transpose(1, 2).flatten(2)))
        out = out + self.mlp(out)
        return out.unflatten(1, self.out_size)


@one_node
def spatial_loss(x: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance of two maps [B, H, W, C] whose tokens have length 1, summed, over the batch's size.

    It is a scalar, float32 at least, and 0 to 4·H·W: cosines of all places count alike.

    Raises:
        ValueError: if the maps are not of one shape.
    """
    if x.shape != target.shape or x.ndim != 4:
        raise ValueError(f"expected two maps [B, H, W, C] of one shape, got {tuple(x.shape)} and {tuple(target.shape)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, target = (F.normalize(value.to(dtype), dim=-1) for value in (x, target))
    return (x - target).square().sum() / x.shape[0]


def frequency_loss(x: Tensor, target: Tensor) -> Tensor:
    """Return `spatial_loss` of two maps [B, H, W, C] without their lowest frequency: their means over the map.

    Raises:
        ValueError: as `spatial_loss`.
    """
    return spatial_loss(_varying(x), _varying(target))


def _varying(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x - x.mean((1, 2), keepdim=True)
