"""Operations on [B, H, W, G, D] and [B, H, W, C] tensors, each with a reference in plain torch; see `backends()`."""

from visionzoo.kernels.depthwise_conv.api import depthwise_conv
from visionzoo.kernels.dispatch import backends, explain
from visionzoo.kernels.halo_attention.api import halo_attention
from visionzoo.kernels.linear_attention.api import linear_attention
from visionzoo.kernels.neighborhood_attention.api import neighborhood_attention
from visionzoo.kernels.region_routing.api import route_regions
from visionzoo.kernels.routed_attention.api import routed_attention

__all__ = [
    "backends",
    "depthwise_conv",
    "explain",
    "halo_attention",
    "linear_attention",
    "neighborhood_attention",
    "route_regions",
    "routed_attention",
]
