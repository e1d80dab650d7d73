"""What our operations are compared with: authors' code, timm's, PyTorch's own attention; found where it is installed.

Every function here takes what fixes the problem and returns a maker: from the inputs of the case it makes the function
that is measured, called with the same inputs by name. Tables that do not depend on q, k and v (masks, FlexAttention's
block masks) are made there, before the clock starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.benchmark.cases import Absent
from visionzoo.engine.errors import UserError
from visionzoo.kernels.regions import from_regions, to_regions

FOLDER_VARIABLE, FORMER_VARIABLE = "VISIONZOO_BASELINES", "VISIONZOO_RIVALS"  # the former is still read
Inputs = dict[str, Tensor]
Maker = Callable[[Inputs], Callable[..., Tensor]]


def use_folder(folder: Path | None) -> None:
    """Let authors' code be imported from a checkout of it: `folder`, or what VISIONZOO_BASELINES names."""
    name = folder or os.environ.get(FOLDER_VARIABLE) or os.environ.get(FORMER_VARIABLE)
    if not name:
        return
    if not Path(name).is_dir():
        raise UserError(
            f"no folder {name}: --baselines and {FOLDER_VARIABLE} name a checkout of the authors' repository"
        )
    sys.path.append(str(Path(name).resolve()))  # last: what is installed keeps its name


def biformer_authors(module: str) -> ModuleType:
    """Import a module of https://github.com/rayleizhu/BiFormer, such as "models.biformer".

    Raises:
        Absent: if it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise Absent(
            f"{module} of github.com/rayleizhu/BiFormer cannot be imported ({error}); name a checkout with --baselines "
            f"or {FOLDER_VARIABLE}, and install einops and fairscale, which it needs"
        ) from error


def compiled(make: Maker) -> Maker:
    """Compile what another maker makes, for these very shapes."""
    return lambda inputs: torch.compile(make(inputs), dynamic=False)


def dense_attention(mask: Callable[[Inputs], Tensor] | None = None) -> Maker:
    """Attention of all tokens to all tokens by PyTorch's SDPA, under an additive mask that is made beforehand."""

    def make(inputs: Inputs) -> Callable[..., Tensor]:
        scores = None if mask is None else mask(inputs)
        return lambda q, k, v, **_: _sdpa(q, k, v, scores)

    return make


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), attn_mask=mask)
    return out.transpose(1, 2).unflatten(1, q.shape[1:3])


def heads_first(x: Tensor) -> Tensor:
    """View [B, H, W, G, D] as [B, G, N, D]."""
    return x.flatten(1, 2).transpose(1, 2)


# Routed attention


def authors_routed_attention(regions: int) -> Maker:
    """Gather keys and values as BiFormer's authors do; on NCHW views of the inputs, in channels-last memory."""

    def make(_: Inputs) -> Callable[..., Tensor]:
        attention = biformer_authors("ops.torch.rrsda").regional_routing_attention_torch

        def call(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
            heads, width = q.shape[3:]
            out, _ = attention(
                *(t.flatten(3).permute(0, 3, 1, 2) for t in (q, k, v)),
                scale=width**-0.5,
                region_graph=index.unsqueeze(1).expand(-1, heads, -1, -1),
                region_size=(q.shape[1] // regions, q.shape[2] // regions),
            )
            return out.permute(0, 2, 3, 1).unflatten(-1, (heads, width))

        return call

    return make


def authors_router(regions: int, topk: int) -> Maker:
    """Choose regions with the authors' router, on means over views of the inputs."""

    def make(inputs: Inputs) -> Callable[..., Tensor]:
        width = inputs["q"].shape[3] * inputs["q"].shape[4]
        router = biformer_authors("ops.bra_legacy").TopkRouting(width, topk=topk)

        def mean(x: Tensor) -> Tensor:
            x = x.flatten(3).unflatten(2, (regions, -1)).unflatten(1, (regions, -1))
            return x.mean((2, 4)).flatten(1, 2)

        return lambda q, k: router(mean(q), mean(k))[1]

    return make


def region_mask(regions: int) -> Callable[[Inputs], Tensor]:
    """For dense attention: -inf [B, 1, N, N] but where the key's region is listed for the query's."""

    def mask(inputs: Inputs) -> Tensor:
        q, index = inputs["q"], inputs["index"]
        count = regions * regions
        listed = torch.zeros(index.shape[0], count, count, dtype=torch.bool, device=q.device)
        listed.scatter_(2, index, True)
        rows = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // regions)
        columns = torch.arange(q.shape[2], device=q.device) // (q.shape[2] // regions)
        region = (rows[:, None] * regions + columns).flatten()
        return _additive(listed[:, region][:, :, region].unsqueeze(1), q.dtype)

    return mask


def _additive(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, float("-inf"))


# Neighborhood attention


def neighborhood(length: int, kernel_size: int, dilation: int, stride: int, device: torch.device) -> Tensor:
    """Which keys along one axis a query sees, by NATTEN's rule: bool [length, length]."""
    group, place, start = _neighbors(torch.arange(length, device=device), length, kernel_size, dilation, stride)
    near = (place >= start[:, None]) & (place < start[:, None] + kernel_size)
    return near & (group == group[:, None])


def _neighbors(
    position: Tensor, length: int, kernel_size: int, dilation: int, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the dilation group of positions, their place in it, and the first place that each of them sees."""
    group, place = position % dilation, position // dilation
    members = (length - group + dilation - 1) // dilation
    leader = torch.minimum(place // stride * stride + stride // 2, members - 1)
    start = torch.minimum((leader - kernel_size // 2).clamp(min=0), members - kernel_size)
    return group, place, start


def neighborhood_mask(kernel_size: int, dilation: int, stride: int = 1) -> Callable[[Inputs], Tensor]:
    """For dense attention: -inf [1, 1, N, N] outside of the neighborhoods."""

    def mask(inputs: Inputs) -> Tensor:
        q = inputs["q"]
        rows, columns = (neighborhood(length, kernel_size, dilation, stride, q.device) for length in q.shape[1:3])
        keep = rows[:, None, :, None] & columns[None, :, None, :]  # [H, W, H, W]
        return _additive(keep.flatten(2).flatten(0, 1)[None, None], q.dtype)

    return mask


def flex_neighborhood_attention(kernel_size: int, dilation: int, stride: int = 1) -> Maker:
    """Neighborhood attention by FlexAttention, tokens row by row; with the bias where the case has one."""

    def make(inputs: Inputs) -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        height, width = inputs["q"].shape[1:3]
        tokens = height * width

        def sees(query: Tensor, key: Tensor, length: int) -> Tensor:
            group, _, start = _neighbors(query, length, kernel_size, dilation, stride)
            place = key // dilation
            return (key % dilation == group) & (place >= start) & (place < start + kernel_size)

        def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(query // width, key // width, height) & sees(query % width, key % width, width)

        def offset(query: Tensor, key: Tensor) -> Tensor:
            # kept inside of the table: scores of keys outside of the neighborhood are computed too, then masked
            return (key // dilation - query // dilation + kernel_size - 1).clamp(0, 2 * kernel_size - 2)

        def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            rows, columns = offset(query // width, key // width), offset(query % width, key % width)
            return score + inputs["bias"][head, rows, columns]

        # compiled where all pairs of tokens at once would take gigabytes
        block_mask = create_block_mask(
            mask, None, None, tokens, tokens, device=inputs["q"].device.type, _compile=tokens > 2**13
        )
        score_mod = biased if "bias" in inputs else None
        flex: Any = torch.compile(flex_attention, dynamic=False)

        def call(q: Tensor, k: Tensor, v: Tensor, **_: Tensor) -> Tensor:
            out = flex(heads_first(q), heads_first(k), heads_first(v), score_mod=score_mod, block_mask=block_mask)
            return out.transpose(1, 2).unflatten(1, (height, width))

        return call

    return make


def natten(kernel_size: int, dilation: int, stride: int = 1) -> Maker:
    """NATTEN's fused neighborhood attention; it has no bias."""

    def make(_: Inputs) -> Callable[..., Tensor]:
        try:
            package = import_module("natten")
            attention = getattr(package, "na2d", None) or import_module("natten.functional").na2d
        except (ImportError, AttributeError) as error:
            raise Absent(f"natten.na2d cannot be imported ({error})") from error
        options = {"kernel_size": kernel_size, "dilation": dilation} | ({"stride": stride} if stride > 1 else {})
        return partial(attention, **options)

    return make


# Window attention


def windows_first(regions: tuple[int, int]) -> Callable[[Inputs], Inputs]:
    """Cut q, k and v into windows: [B·R, G, n, D], each in memory of its own."""

    def rearrange(inputs: Inputs) -> Inputs:
        return {name: _windows(inputs[name], regions).contiguous() for name in ("q", "k", "v")}

    return rearrange


def _windows(x: Tensor, regions: tuple[int, int]) -> Tensor:
    return to_regions(x, regions).transpose(2, 3).flatten(0, 1)


def window_attention_of_windows(_: Inputs) -> Callable[..., Tensor]:
    """SDPA on tensors that are windows already."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v)


def partitioned_window_attention(regions: tuple[int, int]) -> Maker:
    """Cut into windows, attend by SDPA under bias and segments where the case has them, put the windows together."""

    def make(inputs: Inputs) -> Callable[..., Tensor]:
        batch, height, width = inputs["q"].shape[:3]
        apart: Tensor | None = None
        if "segments" in inputs:
            segments = to_regions(inputs["segments"][None], regions)[0]  # [R, n]
            apart = segments[:, None, :, None] != segments[:, None, None, :]  # [R, 1, n, n]

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
            mask = None if bias is None else bias[None]  # [1, G, n, n]
            if mask is not None and apart is not None:
                mask = mask.masked_fill(apart, float("-inf")).repeat(batch, 1, 1, 1)
            q, k, v = (_windows(t, regions) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return from_regions(out.unflatten(0, (batch, -1)).transpose(2, 3), regions, (height, width))

        return call

    return make


# Halo attention


class _Given(nn.Module):
    """Stands in for a projection: gives what it was given, as [B, C, H, W]."""

    value: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.value.flatten(3).permute(0, 3, 1, 2)


def timm_halo_attention(block_size: int, halo_size: int) -> Maker:
    """Run HaloAttn of timm without its projections."""

    def make(inputs: Inputs) -> Callable[..., Tensor]:
        from timm.layers.halo_attn import HaloAttn

        heads, depth = inputs["q"].shape[3:]
        attention: Any = HaloAttn(heads * depth, num_heads=heads, block_size=block_size, halo_size=halo_size)
        attention.q, attention.kv = _Given(), _Given()
        del attention.pos_embed.height_rel, attention.pos_embed.width_rel

        def call(q: Tensor, kv: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
            attention.q.value, attention.kv.value = q, kv
            attention.pos_embed.height_rel, attention.pos_embed.width_rel = rel_height, rel_width
            out = attention(attention.q(q))  # of what it is given it only looks at the size
            return out.permute(0, 2, 3, 1).unflatten(-1, (heads, depth))

        return call

    return make


def group_norm_nchw(inputs: Inputs) -> Callable[..., Tensor]:
    """PyTorch's group normalization with one group, of maps in its own layout (see `channels_first`)."""
    return lambda x, weight, bias: F.group_norm(x, 1, weight, bias)


def channels_first(inputs: Inputs) -> Inputs:
    """Lay the map x out as [B, C, H, W]."""
    return {**inputs, "x": inputs["x"].permute(0, 3, 1, 2).contiguous()}
