"""Attention operations on [B, H, W, G, D] tensors, each with a reference in plain torch; see `backends()`."""

from visionzoo.kernels.dispatch import backends, explain
from visionzoo.kernels.halo_attention.api import halo_attention
from visionzoo.kernels.linear_attention.api import linear_attention
from visionzoo.kernels.region_routing.api import route_regions
from visionzoo.kernels.routed_attention.api import routed_attention

__all__ = ["backends", "explain", "halo_attention", "linear_attention", "route_regions", "routed_attention"]
