"""What every token mixer is: [B, H, W, C] -> [B, H, W, C], any height and width."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.layers.attention import attend, uniform_attention
from visionzoo.layers.maps import MapLayer
from visionzoo.layers.relaxation import Relaxation
from visionzoo.layers.subsampling import Subsampling

GIB = 2**30
HEAD_DIM = 32  # head width where neither the caller nor the family says otherwise: that of most families here


class Mixer(MapLayer):
    """Base of the token mixers; `forward` of each begins with `check_input`.

    Args:
        dim: channels C of the map.
        num_heads: attention heads; None means dim // 32 or the next smaller number that divides dim, at least one.
            Mixers without heads ignore it.
        head_dim: width of a head where the mixer has its own; None means dim / num_heads.
        kv_heads: heads of keys and values where these are shared, each by num_heads / kv_heads heads of queries that
            follow each other (grouped queries, arXiv:2305.13245; one head: multi-query, arXiv:1911.02150); None means
            num_heads.

    Raises:
        ValueError: if the heads do not divide the channels that they share, or kv_heads do not divide the heads.
    """

    ADAPTER = "mixers.MixerNCHW"
    stride = 1  # what the map shrinks by
    SCORE_KINDS = ("class_attention", "received_attention")
    SCORES: tuple[str, ...] = ()  # of these kinds, which it returns beside its output: `forward(x, score=kind)`
    SCORE_MAP = False  # whether its one attention is of all tokens to all, in their order: what `record_attention` has
    RELAXES = False  # whether all its attention can be relaxed in training: `visionzoo.layers.relaxation`
    relaxation: Relaxation | None = None  # how far it is; None: not at all
    SUBSAMPLES = False  # whether all its attention can be of a subset of keys: `visionzoo.layers.subsampling`
    subsampling: Subsampling | None = None  # of which; None: of all
    QUANTIZES = False  # whether its attention heeds `products`, with heads of one width: `visionzoo.quantization`
    needs_prefix_tokens = False  # whether it is one of tokens only, which has nothing to do on a map by itself
    needs_map_size = False  # whether `forward` takes `map_size`, (H, W) of the tokens behind the prefix ones

    needs_places = False  # whether `forward` takes map_size, prefix and source of `visionzoo.layers.tokens.Tokens`

    @property
    def pair_bytes(self) -> int:
        """Bytes that are held at once for each pair of an image's tokens, at least; 0 where memory grows slower.

        Images for which that is more memory than the device has are refused.
        """
        return 0

    @property
    def takes_prefix_tokens(self) -> bool:
        """Whether tokens without a place on the map can take part, as further tokens: the class token and the like.

        So it is where a token's place does not matter, or matters in a part of the mixer that leaves such tokens out.
        Other mixers see only the map, and such tokens pass by.
        """
        return False

    @property
    def takes_dropped_tokens(self) -> bool:
        """Whether `forward` takes `keep` [B, N], False for tokens that others must not see.

        Reducers need it (`visionzoo.layers.reducers`). Such tokens leave no trace in the outputs of the others, and
        their own outputs have no meaning.
        """
        return False

    def __init__(
        self, dim: int, num_heads: int | None = None, *, head_dim: int | None = None, kv_heads: int | None = None
    ):
        super().__init__(dim)
        if num_heads is None:
            num_heads = next(heads for heads in range(max(1, dim // HEAD_DIM), 0, -1) if dim % heads == 0)
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(
                f"{type(self).__name__}: num_heads must divide dim, got {dim=} and {num_heads=}; "
                f"pass a num_heads that divides {dim}"
            )
        self.out_dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.kv_heads = num_heads if kv_heads is None else kv_heads
        self.products: nn.Module | None = None  # what computes attention of quantized factors; None: as it is
        if self.kv_heads < 1 or num_heads % self.kv_heads:
            raise ValueError(f"{type(self).__name__}: kv_heads must divide {num_heads=}, got {kv_heads=}")

    @property
    def qkv_dim(self) -> int:
        """Width of a projection to q, k and v."""
        return (self.num_heads + 2 * self.kv_heads) * self.head_dim

    def check_input(self, x: Tensor) -> None:
        """Check that x is a map this mixer takes, and that memory holds what it makes of pairs of its tokens.

        Raises:
            ValueError: if it is not, see `MapLayer.check_input`, or if its N × N numbers exceed the device's memory.
        """
        super().check_input(x)
        if self.pair_bytes == 0 or torch.compiler.is_compiling():
            return
        tokens = x.shape[1] * x.shape[2]
        needed = self.pair_bytes * tokens**2
        if needed < GIB:  # nearly always
            return
        there = memory_of(x.device)
        if there is not None and needed > there:
            raise ValueError(
                f"{type(self).__name__}: expected at most {isqrt(there // self.pair_bytes):,} tokens on {x.device}, "
                f"which has {there / GIB:.1f} GiB, got {x.shape[1]} x {x.shape[2]} = {tokens:,}: for each pair of them "
                f"{self.pair_bytes} bytes are held, {needed / GIB:.1f} GiB for an image; take a mixer that holds none, "
                f"such as 'linear', 'neighborhood' or 'window', or 'score' for all pairs, or take larger patches"
            )

    def mix_first(self, x: Tensor, **beside: Any) -> Tensor:
        """Return the output [B, 1, C] for the first of tokens [B, N, C], where the mixer `takes_prefix_tokens`.

        Mixers whose outputs do not depend on each other leave the others out; here they are computed. `beside` is what
        `forward` takes besides.
        """
        return self(x.unsqueeze(1), **beside)[:, 0, :1]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Return `visionzoo.layers.attention.attend`, relaxed and of fewer keys in training where the mixer is so."""
        if self.subsampling is not None and (self.training or self.subsampling.always):
            k, v, bias = self.subsampling.draw(k, v, bias)
        products = self.products
        out = attend(q, k, v, bias=bias, scale=scale) if products is None else products(q, k, v, bias)
        return self.relax(out, lambda: uniform_attention(v, bias))

    def relax(self, out: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        """Return the output of attention, relaxed in training where the mixer is.

        Args:
            out: of the attention, of any shape.
            uniform: gives what equal weights make of the same values, broadcast to `out`.
        """
        return self.relaxation.relax(out, uniform()) if self.relaxation is not None and self.training else out

    def split_heads(self, qkv: Tensor | tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each [..., G, D], of a projection [..., (G + 2·kv_heads)·D] laid out (q, k, v) x heads.

        They are views, unless keys and values are shared, which are repeated then. What is split already stays.
        """
        if isinstance(qkv, tuple):  # by visionzoo.quantization's QueryKeyProjection
            return qkv
        heads, shared = self.num_heads, self.kv_heads
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split([heads, shared, shared], -2)
        return q, self.repeat_heads(k), self.repeat_heads(v)

    def repeat_heads(self, x: Tensor) -> Tensor:
        """Keys or values [..., kv_heads, D], for all heads of queries: [..., G, D]."""
        return x if self.kv_heads == self.num_heads else x.repeat_interleave(self.num_heads // self.kv_heads, -2)


def set_on_mixers(model: nn.Module, able: str, name: str, value: Any) -> tuple[int, int]:
    """Set an attribute on the mixers in a model that are able to heed it.

    Args:
        model: whose modules are looked through.
        able: attribute that is true on such mixers.
        name: attribute to set.
        value: what to.

    Returns:
        the number of mixers it is set on, and that of all mixers.
    """
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    changed = [mixer for mixer in mixers if getattr(mixer, able)]
    for mixer in changed:
        setattr(mixer, name, value)
    return len(changed), len(mixers)


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory that a device has, whoever uses them; None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def zero_dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    """Put zeros for the tokens of [B, H, W, ...] for which `keep` [B, H·W] is False; None for none."""
    if keep is None:
        return x
    return x.masked_fill(~keep.view(*x.shape[:3], *(1,) * (x.ndim - 3)), 0)
