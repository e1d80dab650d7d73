"""Cases of single operations: our backends and their baselines on the same tensors, forward and with gradients.

A case is a line of `operation_cases`. Inputs are contiguous [B, H, W, G, D]; implementations with another layout get
views of them, in their own layout where they would have it anyway. Forward runs without autograd; forward+backward
computes the gradients of all floating inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visionzoo import kernels
from visionzoo.benchmark import baselines
from visionzoo.benchmark.baselines import Inputs, compiled
from visionzoo.benchmark.cases import Absent, Case, Settings
from visionzoo.benchmark.implementations import BOTH, FORWARD, Draw, Implementation, Problem
from visionzoo.benchmark.timing import Cost
from visionzoo.layers.block import add_scaled

BATCH = 64
MAP_BATCH = 128  # of convolutions and norms, whose maps are quick to read


def operation_cases(settings: Settings) -> list[Case]:
    """List all cases of operations."""
    groups = (
        *(_routed, _routing, _neighborhood, _window, _halo, _score, _linear, _depthwise, _group_norm),
        *(_residual_norm, _channel),
    )
    return [case for group in groups for case in group(settings)]


def token_cases(settings: Settings) -> list[Case]:
    """List cases of growing maps, up to 65,536 tokens, for operations whose memory should grow with the tokens."""
    cases = []
    for side in (32, 64, 128, 256):
        sizes: dict[str, Any] = {"batch": 1, "side": side, "heads": 4, "depth": 32}
        cases += [
            routed_case(settings, f"tokens-routed/{side * side}", **sizes, regions=8, topk=4),
            neighborhood_case(settings, f"tokens-neighborhood/{side * side}", **sizes, kernel_size=7),
            linear_case(settings, f"tokens-linear/{side * side}", **sizes, feature_map="relu"),
        ]
    return cases


def _routed(settings: Settings) -> Iterator[Case]:
    for side, heads, topk in ((56, 2, 1), (28, 4, 4), (14, 8, 16)):  # BiFormer's stages at 224 px
        name = f"routed/{side}x{side}-g{heads}-d32-k{topk}"
        yield routed_case(settings, name, batch=BATCH, side=side, heads=heads, depth=32, regions=7, topk=topk)


def routed_case(
    settings: Settings, name: str, *, batch: int, side: int, heads: int, depth: int, regions: int, topk: int
) -> Case:
    """Routed attention on a random graph of regions."""

    def draw(normal: Draw) -> Inputs:
        q, k, v = (normal(normal.batch, side, side, heads, depth) for _ in range(3))
        count = regions * regions
        order = torch.rand(normal.batch, count, count, device=q.device, generator=normal.generator).argsort(-1)
        return {"q": q, "k": k, "v": v, "index": order[..., :topk].contiguous()}

    implementations = {
        **zoo("routed_attention", regions=regions, check_index=False),
        "authors": Implementation(baselines.authors_routed_attention(regions)),
        "authors-compiled": Implementation(compiled(baselines.authors_routed_attention(regions))),
        "sdpa": Implementation(baselines.dense_attention(), same=False),
    }
    if side * side <= 2**13:  # its mask has the square of that many numbers
        implementations["sdpa-masked"] = Implementation(baselines.dense_attention(baselines.region_mask(regions)))
    keys = topk * (side // regions) ** 2
    shape = f"{side}x{side}, {heads} heads of {depth}, {regions}x{regions} regions, top-{topk}"
    return Problem(
        settings, name, batch, shape, draw, implementations, attention_costs(side * side, heads, depth, keys)
    ).case(side * side)


def _routing(settings: Settings) -> Iterator[Case]:
    for side, heads, topk in ((56, 2, 1), (28, 4, 4), (14, 8, 16)):
        yield routing_case(settings, f"routing/{side}x{side}-g{heads}-d32-k{topk}", side=side, heads=heads, topk=topk)


def routing_case(settings: Settings, name: str, *, side: int, heads: int, topk: int) -> Case:
    """Routing of 7×7 regions, with heads of 32."""

    def draw(normal: Draw) -> Inputs:
        return {name: normal(normal.batch, side, side, heads, 32) for name in "qk"}

    implementations = {
        **zoo("route_regions", regions=7, topk=topk),
        "authors": Implementation(baselines.authors_router(7, topk)),
        "authors-compiled": Implementation(compiled(baselines.authors_router(7, topk))),
    }
    shape, costs = (
        f"{side}x{side}, {heads} heads of 32, 7x7 regions, top-{topk}",
        partial(_routing_costs, side * side * heads * 32),
    )
    return Problem(settings, name, BATCH, shape, draw, implementations, costs).case(side * side)


def _routing_costs(numbers: int, batch: int, itemsize: int) -> dict[str, Cost]:
    return {FORWARD: Cost(2 * batch * numbers * itemsize, 0)}  # read q and k; the rest is small


def _neighborhood(settings: Settings) -> Iterator[Case]:
    # NAT and DiNAT at 224 px, kernel 7: each stage without dilation and with its largest
    for side, heads, dilations in ((56, 2, (1, 8)), (28, 4, (1, 4)), (14, 8, (1, 2)), (7, 16, (1,))):
        for dilation in dilations:
            for bias in (False, True):
                name = f"neighborhood/{side}x{side}-g{heads}-d32-k7-x{dilation}{'-bias' if bias else ''}"
                yield neighborhood_case(
                    settings,
                    name,
                    batch=BATCH,
                    side=side,
                    heads=heads,
                    depth=32,
                    kernel_size=7,
                    dilation=dilation,
                    bias=bias,
                )
    large: dict[str, Any] = {"batch": 8, "side": 128, "heads": 4, "depth": 64}
    yield neighborhood_case(settings, "neighborhood/128x128-g4-d64-k13-x1", **large, kernel_size=13)
    # with a stride that leaves windows which overlap, and as windows that cut the map
    middle: dict[str, Any] = {"batch": BATCH, "side": 56, "heads": 2, "depth": 32}
    for sizes, kernel_size, strides in ((middle, 7, (2, 4, 7)), (large, 13, (4,)), (large, 16, (8, 16))):
        for stride in strides:
            side, heads, depth = (sizes[key] for key in ("side", "heads", "depth"))
            name = f"neighborhood/{side}x{side}-g{heads}-d{depth}-k{kernel_size}-s{stride}"
            yield neighborhood_case(settings, name, **sizes, kernel_size=kernel_size, stride=stride)


def neighborhood_case(
    settings: Settings,
    name: str,
    *,
    batch: int,
    side: int,
    heads: int,
    depth: int,
    kernel_size: int,
    dilation: int = 1,
    stride: int = 1,
    bias: bool = False,
) -> Case:
    """Neighborhood attention, with or without relative position bias.

    With a stride "visionzoo-stride-1" is what it is to be faster than: each token's own window.
    """

    def draw(normal: Draw) -> Inputs:
        inputs = {name: normal(normal.batch, side, side, heads, depth) for name in "qkv"}
        if bias:
            inputs["bias"] = normal(heads, 2 * kernel_size - 1, 2 * kernel_size - 1)
        return inputs

    implementations = {
        **zoo("neighborhood_attention", kernel_size=kernel_size, dilation=dilation, stride=stride),
        "flex": Implementation(baselines.flex_neighborhood_attention(kernel_size, dilation, stride)),
        "sdpa": Implementation(baselines.dense_attention(), same=side == kernel_size and not bias),
    }
    if stride > 1:
        each = partial(operation("neighborhood_attention"), kernel_size=kernel_size, dilation=dilation)
        implementations["visionzoo-stride-1"] = Implementation(lambda _: each, same=False)
    if not bias:
        implementations["natten"] = Implementation(baselines.natten(kernel_size, dilation, stride))
        if side <= 128:
            mask = baselines.neighborhood_mask(kernel_size, dilation, stride)
            implementations["sdpa-masked"] = Implementation(baselines.dense_attention(mask))
    costs = attention_costs(side * side, heads, depth, kernel_size**2)
    shape = f"{side}x{side}, {heads} heads of {depth}, kernel {kernel_size}, dilation {dilation}"
    shape += f"{f', stride {stride}' * (stride > 1)}{', bias' * bias}"
    return Problem(settings, name, batch, shape, draw, implementations, costs, shared=("bias",)).case(side * side)


def _window(settings: Settings) -> Iterator[Case]:
    for side, heads in ((56, 3), (28, 6), (14, 12), (7, 24)):  # DaViT's and Swin's tiny variants at 224 px
        yield window_case(settings, f"window/{side}x{side}-g{heads}-d32-w7", side, heads)
    for side, heads in ((56, 3), (14, 12)):
        yield window_case(settings, f"window/{side}x{side}-g{heads}-d32-w7-shifted-bias", side, heads, shifted=True)


def window_case(settings: Settings, name: str, side: int, heads: int, shifted: bool = False) -> Case:
    """Attention in windows of 7×7; as in shifted windows with bias and with parts that stay apart, or with neither."""
    regions = (side // 7, side // 7)

    def draw(normal: Draw) -> Inputs:
        inputs = {name: normal(normal.batch, side, side, heads, 32) for name in "qkv"}
        if shifted:
            inputs["bias"] = normal(heads, 49, 49)
            last = (torch.arange(side, device=normal.device) >= side - 3).long()
            inputs["segments"] = 2 * last[:, None] + last
        return inputs

    def ours(backend: str, inputs: Inputs) -> Callable[..., Tensor]:
        return partial(operation("routed_attention"), index=None, regions=regions, backend=backend)

    implementations = {
        **backends(ours),
        "partition-sdpa": Implementation(baselines.partitioned_window_attention(regions)),
        "partition-sdpa-compiled": Implementation(compiled(baselines.partitioned_window_attention(regions))),
    }
    if not shifted:  # what is left where a model cuts its map into windows once, before the projection
        implementations["sdpa-of-windows"] = Implementation(
            baselines.window_attention_of_windows, same=False, rearrange=baselines.windows_first(regions)
        )
    shape = f"{side}x{side}, {heads} heads of 32, windows of 7x7{', shifted, bias' * shifted}"
    costs = attention_costs(side * side, heads, 32, 49)
    return Problem(settings, name, BATCH, shape, draw, implementations, costs, shared=("bias", "segments")).case(
        side**2
    )


def _halo(settings: Settings) -> Iterator[Case]:
    for side, heads, depth in ((32, 4, 32), (16, 8, 32), (8, 8, 64)):  # halonet50ts at 256 px
        yield halo_case(settings, f"halo/{side}x{side}-g{heads}-d{depth}-b8-h3", side, heads, depth)


def halo_case(settings: Settings, name: str, side: int, heads: int, depth: int) -> Case:
    """Halo attention with blocks of 8×8 and a rim of 3, keys and values from one projection."""

    def draw(normal: Draw) -> Inputs:
        return {
            "q": normal(normal.batch, side, side, heads, depth),
            "kv": normal(normal.batch, side, side, heads, 2 * depth),
            "rel_height": normal(27, depth, scale=depth**-0.5),
            "rel_width": normal(27, depth, scale=depth**-0.5),
        }

    def ours(backend: str, inputs: Inputs) -> Callable[..., Tensor]:
        attention = operation("halo_attention")

        def call(q: Tensor, kv: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
            k, v = kv.split(depth, -1)
            return attention(q, k, v, rel_height, rel_width, block_size=8, halo_size=3, backend=backend)

        return call

    implementations = {
        **backends(ours),
        "timm": Implementation(baselines.timm_halo_attention(8, 3)),
        "timm-compiled": Implementation(compiled(baselines.timm_halo_attention(8, 3))),
    }
    shape = f"{side}x{side}, {heads} heads of {depth}, blocks of 8x8, halo 3"
    costs = attention_costs(side * side, heads, depth, 14**2)
    return Problem(settings, name, BATCH, shape, draw, implementations, costs, shared=("rel_height", "rel_width")).case(
        side**2
    )


def _score(settings: Settings) -> Iterator[Case]:
    for side, heads, depth, batch in ((64, 8, 64, 8), (14, 6, 64, BATCH)):  # 4,096 tokens; ViT-S at 224 px
        names = ("sigmoid", "relu", "signed_softmax", "softplus", "taylor") if side == 64 else ("sigmoid",)
        for normalizer in names:
            name = f"score/{side}x{side}-g{heads}-d{depth}-{normalizer}"
            sizes: dict[str, Any] = {"batch": batch, "side": side, "heads": heads, "depth": depth}
            yield score_case(settings, name, **sizes, normalizer=normalizer)


def score_case(
    settings: Settings, name: str, *, batch: int, side: int, heads: int, depth: int, normalizer: str
) -> Case:
    """Attention with weights that are a function of the scores, beside the softmax of torch."""

    def draw(normal: Draw) -> Inputs:
        return {name: normal(normal.batch, side, side, heads, depth) for name in "qkv"}

    ours = zoo("score_attention", normalizer=normalizer)
    implementations = {
        **ours,
        "visionzoo-reference-compiled": Implementation(compiled(ours["visionzoo-reference"].make)),
        "sdpa": Implementation(baselines.dense_attention(), same=False),
    }
    costs = attention_costs(side * side, heads, depth, side * side)
    shape = f"{side}x{side}, {heads} heads of {depth}, {normalizer}"
    return Problem(settings, name, batch, shape, draw, implementations, costs).case(side * side)


def _linear(settings: Settings) -> Iterator[Case]:
    # FLatten's Swin and PVT at 224 px, and large images
    for side, heads, depth, batch in ((56, 2, 32, BATCH), (56, 1, 64, BATCH), (14, 8, 32, BATCH), (256, 4, 32, 1)):
        for feature_map in ("focused", "relu", "elu", "softmax"):
            name = f"linear/{side}x{side}-g{heads}-d{depth}-{feature_map}"
            sizes: dict[str, Any] = {"batch": batch, "side": side, "heads": heads, "depth": depth}
            yield linear_case(settings, name, **sizes, feature_map=feature_map)
    # features of another width than values
    for side, heads, depth, value_depth in ((56, 2, 32, 64), (56, 1, 64, 128)):
        for feature_map in ("elu", "softmax"):
            name = f"linear/{side}x{side}-g{heads}-d{depth}-v{value_depth}-{feature_map}"
            sizes = {"batch": BATCH, "side": side, "heads": heads, "depth": depth, "value_depth": value_depth}
            yield linear_case(settings, name, **sizes, feature_map=feature_map)


def linear_case(
    settings: Settings,
    name: str,
    *,
    batch: int,
    side: int,
    heads: int,
    depth: int,
    feature_map: str,
    value_depth: int | None = None,
) -> Case:
    """Linear attention, "focused" with a temperature as in FLatten; values as wide as queries by default."""
    depths = {"q": depth, "k": depth, "v": value_depth or depth}

    def draw(normal: Draw) -> Inputs:
        inputs = {name: normal(normal.batch, side, side, heads, width) for name, width in depths.items()}
        if feature_map == "focused":
            inputs["temperature"] = normal(heads, depth, scale=0.1, mean=1.0)
        return inputs

    ours = zoo("linear_attention", feature_map=feature_map)
    implementations = {
        **ours,
        "visionzoo-reference-compiled": Implementation(compiled(ours["visionzoo-reference"].make)),
        "sdpa": Implementation(baselines.dense_attention(), same=False),
    }

    def costs(batch: int, itemsize: int) -> dict[str, Cost]:
        tokens = batch * side**2 * heads
        tensors, product = tokens * (depth + depths["v"]), 2 * tokens * depth * depths["v"]
        # Forward: read q, k, v, write the output; two products with the state. Backward: read q, k, v and the output's
        # gradient, write three gradients; four products with the state or its gradient.
        return {
            FORWARD: Cost(2 * tensors * itemsize, 2 * product),
            BOTH: Cost((2 * tensors + 2 * tensors + tokens * (2 * depth + depths["v"])) * itemsize, (2 + 4) * product),
        }

    shape = f"{side}x{side}, {heads} heads of {depth}, "
    shape += feature_map if value_depth is None else f"values of {value_depth}, {feature_map}"
    return Problem(settings, name, batch, shape, draw, implementations, costs, shared=("temperature",)).case(
        side * side
    )


def _depthwise(settings: Settings) -> Iterator[Case]:
    # BiFormer's and DaViT's residual convolutions, BiFormer's position terms of v, PVTv2's and FLatten's inside MLPs
    for side, dim in ((56, 64), (28, 128), (14, 256), (7, 512), (56, 96), (14, 384), (56, 512), (14, 1280)):
        yield depthwise_case(settings, f"depthwise/{side}x{side}-c{dim}-k3", side, dim, 3, "itself")
    for side, dim in ((56, 64), (28, 128), (14, 256), (7, 512)):
        yield depthwise_case(settings, f"depthwise/{side}x{side}-c{dim}-k5-of-v", side, dim, 5, "other")
    yield depthwise_case(settings, "depthwise/56x56-c64-k7", 56, 64, 7, None)
    yield depthwise_case(settings, "depthwise/56x56-c32-k3-stripes", 56, 32, 3, "other", regions=(1, 56))


def depthwise_case(
    settings: Settings,
    name: str,
    side: int,
    dim: int,
    kernel_size: int,
    residual: str | None,
    regions: tuple[int, int] | None = None,
) -> Case:
    """Depthwise convolution; plus its input ("itself"), or of a third of a projection plus an "other" map."""

    def draw(normal: Draw) -> Inputs:
        x = normal(normal.batch, side, side, 3 * dim if residual == "other" else dim)
        inputs = {
            "x": x[..., -dim:].detach().requires_grad_(),
            "weight": normal(dim, 1, kernel_size, kernel_size),
            "bias": normal(dim),
        }
        return inputs | ({"y": normal(normal.batch, side, side, dim)} if residual == "other" else {})

    def ours(backend: str, inputs: Inputs) -> Callable[..., Tensor]:
        convolution = operation("depthwise_conv")

        def call(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor | None = None) -> Tensor:
            added = x if residual == "itself" else y
            return convolution(x, weight, bias, residual=added, regions=regions, backend=backend)

        return call

    implementations = {
        **backends(ours),
        "cudnn-compiled": Implementation(compiled(lambda inputs: ours("reference", inputs))),
    }

    def costs(batch: int, itemsize: int) -> dict[str, Cost]:
        # forward: read x and an added map, write the output; backward: read x and the output's gradient, write x's.
        # Few operations, which are none of the matrix units.
        numbers = batch * side**2 * dim
        forward = (3 if residual == "other" else 2) * numbers * itemsize
        return {FORWARD: Cost(forward, 0), BOTH: Cost(forward + 3 * numbers * itemsize, 0)}

    shape = f"{side}x{side}, {dim} channels, kernel {kernel_size}"
    if residual:
        shape += ", plus its input" if residual == "itself" else ", of a part of a projection, plus a map"
    if regions:
        shape += f", in {regions[0]}x{regions[1]} regions"
    return Problem(settings, name, MAP_BATCH, shape, draw, implementations, costs, shared=("weight", "bias")).case(
        side * side
    )


def _group_norm(settings: Settings) -> Iterator[Case]:
    for side, dim in ((56, 64), (28, 128), (14, 320), (7, 512)):  # poolformer_s12 at 224 px
        yield group_norm_case(settings, f"group_norm/{side}x{side}-c{dim}", side, dim)


def group_norm_case(settings: Settings, name: str, side: int, dim: int) -> Case:
    """Group normalization with one group."""

    def draw(normal: Draw) -> Inputs:
        return {"x": normal(normal.batch, side, side, dim), "weight": normal(dim, mean=1.0), "bias": normal(dim)}

    def costs(batch: int, itemsize: int) -> dict[str, Cost]:
        # read for the statistics, read again and write; backward: read input and gradient twice, and write
        passes = batch * side * side * dim * itemsize
        return {FORWARD: Cost(3 * passes, 0), BOTH: Cost((3 + 5) * passes, 0)}

    implementations = {
        **zoo("group_norm"),
        "torch-nchw": Implementation(baselines.group_norm_nchw, same=False, rearrange=baselines.channels_first),
    }
    shape = f"{side}x{side}, {dim} channels"
    return Problem(settings, name, MAP_BATCH, shape, draw, implementations, costs, shared=("weight", "bias")).case(
        side**2
    )


def _residual_norm(settings: Settings) -> Iterator[Case]:
    # maps of BiFormer-T, DaViT-T, PVTv2-B1 and DeiT-S at 224 px
    sizes = ((56, 64), (28, 128), (14, 256), (7, 512), (56, 96), (28, 192), (14, 384), (7, 768), (14, 320))
    for batch in (MAP_BATCH, 1):
        for side, dim in sizes:
            name = f"residual_norm/{batch}x{side}x{side}-c{dim}"
            yield residual_norm_case(settings, name, side, dim, batch=batch)
    name = f"residual_norm/{MAP_BATCH}x14x14-c384-scaled"
    yield residual_norm_case(settings, name, 14, 384, batch=MAP_BATCH, scaled=True)


def residual_norm_case(settings: Settings, name: str, side: int, dim: int, *, batch: int, scaled: bool = False) -> Case:
    """Add a branch to its residual and normalize the sum; scaled by channels and samples, or not.

    "visionzoo-reference" is torch's addition and norm, "visionzoo-apart" its addition and our norm.
    """

    def draw(normal: Draw) -> Inputs:
        maps = {name: normal(normal.batch, side, side, dim) for name in ("x", "branch")}
        rows = {"weight": normal(dim, mean=1.0), "bias": normal(dim)}
        scales = {"scale": normal(dim), "factor": normal(normal.batch, mean=1.0).detach()}
        return {**maps, **rows, **(scales if scaled else {})}

    def apart(inputs: Inputs) -> Callable[..., Any]:
        norm = operation("layer_norm")

        def call(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, **by: Tensor) -> tuple[Tensor, Tensor]:
            y = add_scaled(x, branch, by["scale"] * by["factor"].view(-1, 1, 1, 1)) if by else x + branch
            return y, norm(y, weight, bias)

        return call

    def costs(batch: int, itemsize: int) -> dict[str, Cost]:
        # read both terms, write sum and norm; backward: read both gradients and the sum, write the terms' gradient;
        # scaled, the branch is read as well and has a gradient of its own
        passes = batch * side * side * dim * itemsize
        return {FORWARD: Cost(4 * passes, 0), BOTH: Cost((4 + (6 if scaled else 4)) * passes, 0)}

    implementations = {**zoo("residual_norm"), "visionzoo-apart": Implementation(apart)}
    shape = f"{side}x{side}, {dim} channels{', scaled' * scaled}"
    shared = ("weight", "bias", "scale")
    return Problem(settings, name, batch, shape, draw, implementations, costs, shared=shared).case(side**2)


def _channel(settings: Settings) -> Iterator[Case]:
    for side, heads in ((56, 3), (28, 6), (14, 12), (7, 24)):  # davit_t at 224 px
        yield channel_case(settings, f"channel/{side}x{side}-g{heads}-d32", side, heads)


def channel_case(settings: Settings, name: str, side: int, heads: int) -> Case:
    """Channel attention with heads of 32."""

    def draw(normal: Draw) -> Inputs:
        return {name: normal(normal.batch, side, side, heads, 32) for name in "qkv"}

    def costs(batch: int, itemsize: int) -> dict[str, Cost]:
        # read q, k and v, write the output; backward: read those and the output's gradient, write three gradients.
        # Two products forward, four more backward, and that of the keys and values once more.
        numbers, product = batch * side**2 * heads * 32, 2 * batch * side**2 * heads * 32**2
        return {
            FORWARD: Cost(4 * numbers * itemsize, 2 * product),
            BOTH: Cost((4 + 7) * numbers * itemsize, (2 + 5) * product),
        }

    ours = zoo("channel_attention")
    implementations = {
        **ours,
        "visionzoo-reference-compiled": Implementation(compiled(ours["visionzoo-reference"].make)),
    }
    shape = f"{side}x{side}, {heads} heads of 32"
    return Problem(settings, name, BATCH, shape, draw, implementations, costs).case(side**2)


def attention_costs(tokens: int, heads: int, depth: int, keys: int) -> Callable[[int, int], dict[str, Cost]]:
    """Least work of attention with `keys` keys a query, as a function of batch and bytes a number.

    Forward: q, k, v read once and the output written once; two products of 2·D FLOPs a pair. Backward: those four and
    the output's gradient read, three gradients written; five products, the scores among them once more.
    """

    def costs(batch: int, itemsize: int) -> dict[str, Cost]:
        tensor, pairs = batch * tokens * heads * depth * itemsize, batch * tokens * heads * keys
        return {
            FORWARD: Cost(4 * tensor, 2 * 2 * depth * pairs),
            BOTH: Cost((4 + 8) * tensor, (2 + 5) * 2 * depth * pairs),
        }

    return costs


def operation(name: str) -> Callable[..., Tensor]:
    """Return the public function of an operation.

    Raises:
        Absent: if this version of visionzoo has none of that name.
    """
    function = getattr(kernels, name, None)
    if function is None:
        raise Absent(f"this version of visionzoo has no {name}")
    return function


def zoo(name: str, **options: Any) -> dict[str, Implementation]:
    """Return our implementations of an operation that takes the case's inputs by name."""
    return backends(lambda backend, inputs: partial(operation(name), **options, backend=backend))


def backends(make: Callable[[str, Inputs], Callable[..., Tensor]]) -> dict[str, Implementation]:
    """Return what users get ("visionzoo", the backend "auto"), and each backend by name."""

    def triton(inputs: Inputs) -> Callable[..., Tensor]:
        function = make("triton", inputs)

        def call(**inputs: Tensor) -> Tensor:
            try:
                return function(**inputs)
            except ValueError as error:  # how a backend that was asked for by name says that it cannot run
                raise Absent(str(error)) from error

        return call

    return {
        "visionzoo": Implementation(partial(make, "auto")),
        "visionzoo-triton": Implementation(triton),
        "visionzoo-reference": Implementation(partial(make, "reference")),
    }
