"""Calls of every operation, on the same maps, for tests that each of them must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from visionzoo.kernels import (
    channel_attention,
    depthwise_conv,
    group_norm,
    halo_attention,
    layer_norm,
    linear_attention,
    neighborhood_attention,
    residual_norm,
    route_regions,
    routed_attention,
    score_attention,
)

HEADS, HEAD_DIM = 2, 16
# maps (batch, height, width); even, since some calls cut them into regions of 2 × 2 tokens, others into 2 × 2 regions
SIZES = [
    (1, 4, 6),
    (2, 6, 6),
    (2, 6, 8),
    (3, 8, 6),
    (1, 10, 8),
    (2, 8, 12),
    (4, 10, 10),
    (1, 12, 8),
    (2, 12, 14),
    (3, 14, 6),
]


@dataclass(frozen=True)
class Kind:
    """What a call computes of q, k, v [B, H, W, G, D] and parameters, and which operations it needs for that.

    `parts` are the operators of an operation that has several.
    """

    operations: tuple[str, ...]
    function: Callable[..., Tensor]
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    @property
    def operators(self) -> set[str]:
        """Names of the operators in a graph of the call."""
        return set(self.parts or self.operations)


class Call(nn.Module):
    """A call on a map [B, H, W, C] with a projection to q, k and v before it: what a token mixer does."""

    def __init__(self, kind: Kind, device: str):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = kind.function

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(device) / 4)

        self.qkv = parameter(3 * HEADS * HEAD_DIM, HEADS * HEAD_DIM)
        self.extra = nn.ParameterDict({name: parameter(*shape) for name, shape in kind.parameters.items()})

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to what the operation returns."""
        q, k, v = nn.functional.linear(x, self.qkv).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(3)
        return self.function(q, k, v, **{name: parameter.to(q.dtype) for name, parameter in self.extra.items()})


def draw(size: tuple[int, int, int], device: str) -> Tensor:
    """Return a map [B, H, W, C] that takes a gradient."""
    x = torch.randn(*size, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1))
    return x.to(device).requires_grad_()


def operators(graph: torch.fx.GraphModule) -> set[str]:
    """Return the names of the zoo's operators in a graph."""
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    return {target.split(".")[1] for target in targets if target.startswith("visionzoo.")}


class Graphs:
    """A backend of torch.compile that keeps which of the zoo's operators each graph has that it compiles."""

    def __init__(self, backend: str):
        self.compile = lookup_backend(backend)
        self.operators: list[set[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        """Compile a graph."""
        self.operators.append(operators(graph))
        return self.compile(graph, inputs)


def _routed(q, k, v, weight):
    valid = {"valid_size": (q.shape[1] - 1, q.shape[2])}
    index = route_regions(q, k, regions=2, topk=3, **valid)
    return routed_attention(q, k, v, index, regions=2, weights=weight.sigmoid().expand(index.shape), **valid)


def _linear(q, k, v):
    out, weights = linear_attention(q, k, v[..., :9], feature_map="elu", return_weights=True)
    return torch.cat([out, (weights / (1 + weights))[..., None].to(out.dtype)], -1)


def _residual(q, k, v, **parameters):
    factor = ((torch.arange(q.shape[0], device=q.device) + 1) % 2 * 1.25).to(q.dtype)
    return _in_one(residual_norm(q.flatten(3), v.flatten(3), **parameters, factor=factor))


def _in_one(results):
    return torch.cat([result.to(results[-1].dtype) for result in results], -1)


def _windows(q, k, v, bias):
    height, width = q.shape[1:3]
    segments = torch.arange(height * width, device=q.device).view(height, width) % 3
    return routed_attention(q, k, v, None, regions=(height // 2, width // 2), bias=bias, segments=segments)


KINDS = {
    "regions routed, with weights and padding": Kind(("route_regions", "routed_attention"), _routed, {"weight": (1,)}),
    "windows with bias and segments": Kind(("routed_attention",), _windows, {"bias": (HEADS, 4, 4)}),
    "halo": Kind(
        ("halo_attention",),
        lambda q, k, v, **tables: halo_attention(q, k, v, **tables, block_size=4, halo_size=1),
        {"rel_height": (11, HEAD_DIM), "rel_width": (11, HEAD_DIM)},
    ),
    "halo with stride, masked": Kind(
        ("halo_attention",),
        lambda q, k, v, **tables: halo_attention(
            q[:, ::2, ::2], k, v, **tables, block_size=4, halo_size=1, stride=2, mask_padding=True
        ),
        {"rel_height": (11, HEAD_DIM), "rel_width": (11, HEAD_DIM)},
    ),
    "neighborhood with bias": Kind(
        ("neighborhood_attention",),
        lambda q, k, v, bias: neighborhood_attention(q, k, v, kernel_size=3, bias=bias),
        {"bias": (HEADS, 5, 5)},
    ),
    "neighborhood with stride": Kind(
        ("neighborhood_attention",), lambda q, k, v: neighborhood_attention(q, k, v, kernel_size=(3, 4), stride=(3, 2))
    ),
    "sigmoid of scores": Kind(
        ("score_attention",), lambda q, k, v: score_attention(q, k[:, 1:], v[:, 1:], normalizer="sigmoid")
    ),
    "softplus of scores": Kind(
        ("score_attention",), lambda q, k, v: score_attention(q, k, v, normalizer="softplus", scale=0.5)
    ),
    "linear, with weights": Kind(("linear_attention",), _linear),
    "focused linear": Kind(
        ("linear_attention",),
        lambda q, k, v, temperature: linear_attention(
            q, k, v, feature_map="focused", temperature=temperature.exp()
        ),
        {"temperature": (HEADS, HEAD_DIM)},
    ),
    "channels": Kind(("channel_attention",), channel_attention, parts=("channel_products", "channel_mix")),
    "depthwise convolution onto a residual": Kind(
        ("depthwise_conv",),
        lambda q, k, v, weight, bias: depthwise_conv(v.flatten(3), weight, bias, residual=q.flatten(3)),
        {"weight": (HEADS * HEAD_DIM, 1, 3, 3), "bias": (HEADS * HEAD_DIM,)},
    ),
    "group norm": Kind(
        ("group_norm",),
        lambda q, k, v, weight, bias: group_norm(q.flatten(3), weight, bias),
        {"weight": (HEADS * HEAD_DIM,), "bias": (HEADS * HEAD_DIM,)},
    ),
    "layer norm": Kind(
        ("layer_norm",),
        lambda q, k, v, weight, bias: layer_norm(q.flatten(3), weight, bias),
        {"weight": (HEADS * HEAD_DIM,), "bias": (HEADS * HEAD_DIM,)},
    ),
    "residual norm with scale and stochastic depth": Kind(
        ("residual_norm",),
        _residual,
        {name: (HEADS * HEAD_DIM,) for name in ("weight", "bias", "scale")},
    ),
    "residual norm": Kind(
        ("residual_norm",),
        lambda q, k, v, weight, bias: _in_one(residual_norm(q.flatten(3), v.flatten(3), weight, bias)),
        {"weight": (HEADS * HEAD_DIM,), "bias": (HEADS * HEAD_DIM,)},
    ),
}  # fmt: skip
