"""The zoo's operations, each with a reference in plain torch and Triton kernels; see `backends()` and `explain()`.

Attention works on [B, H, W, G, D] tensors: batch, height, width, heads, head width.
"""

from visionzoo.kernels.channel_attention.api import channel_attention
from visionzoo.kernels.depthwise_conv.api import depthwise_conv
from visionzoo.kernels.dispatch import backends, explain
from visionzoo.kernels.group_norm.api import group_norm
from visionzoo.kernels.halo_attention.api import halo_attention
from visionzoo.kernels.layer_norm.api import layer_norm
from visionzoo.kernels.linear_attention.api import linear_attention
from visionzoo.kernels.neighborhood_attention.api import neighborhood_attention
from visionzoo.kernels.region_routing.api import route_regions
from visionzoo.kernels.residual_norm.api import residual_norm
from visionzoo.kernels.routed_attention.api import routed_attention
from visionzoo.kernels.scope import set_backend, use_backend
from visionzoo.kernels.score_attention.api import score_attention

__all__ = [
    "backends",
    "channel_attention",
    "depthwise_conv",
    "explain",
    "group_norm",
    "halo_attention",
    "layer_norm",
    "linear_attention",
    "neighborhood_attention",
    "residual_norm",
    "route_regions",
    "routed_attention",
    "score_attention",
    "set_backend",
    "use_backend",
]
