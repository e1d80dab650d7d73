"""What every token mixer is: [B, H, W, C] -> [B, H, W, C], any height and width."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visionzoo.layers.maps import MapLayer

HEAD_DIM = 32  # head width where neither the caller nor the family says otherwise: that of most families here


class Mixer(MapLayer):
    """Base of the token mixers; `forward` of each begins with `check_input`.

    Args:
        dim: channels C of the map.
        num_heads: attention heads; None means dim // 32 or the next smaller number that divides dim, at least one.
            Mixers without heads ignore it.
        head_dim: width of a head where the mixer has its own; None means dim / num_heads.

    Raises:
        ValueError: if the heads do not divide the channels that they share.
    """

    ADAPTER = "mixers.MixerNCHW"
    stride = 1  # what the map shrinks by
    SCORE_KINDS = ("class_attention", "received_attention")
    SCORES: tuple[str, ...] = ()  # of these kinds, which it returns beside its output: `forward(x, score=kind)`
    SCORE_MAP = False  # whether its one attention is of all tokens to all, in their order: what `record_attention` has
    needs_prefix_tokens = False  # whether it is one of tokens only, which has nothing to do on a map by itself
    needs_map_size = False  # whether `forward` takes `map_size`, (H, W) of the tokens behind the prefix ones

    needs_places = False  # whether `forward` takes map_size, prefix and source of `visionzoo.layers.tokens.Tokens`

    @property
    def takes_prefix_tokens(self) -> bool:
        """Whether tokens without a place on the map can take part, as further tokens: the class token and the like.

        So it is where a token's place does not matter, or matters in a part of the mixer that leaves such tokens out.
        Other mixers see the map alone, and such tokens pass by.
        """
        return False

    @property
    def takes_dropped_tokens(self) -> bool:
        """Whether `forward` takes `keep` [B, N], False for tokens that others must not see.

        Reducers need it (`visionzoo.layers.reducers`). Such tokens leave no trace in the outputs of the others, and
        their own outputs have no meaning.
        """
        return False

    def __init__(self, dim: int, num_heads: int | None = None, *, head_dim: int | None = None):
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

    def mix_first(self, x: Tensor, **beside: Any) -> Tensor:
        """Return the output [B, 1, C] for the first of tokens [B, N, C], where the mixer `takes_prefix_tokens`.

        Mixers whose outputs do not depend on each other leave the others out; here they are computed. `beside` is what
        `forward` takes besides.
        """
        return self(x.unsqueeze(1), **beside)[:, 0, :1]

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views q, k, v, each [B, H, W, G, D], of a projection [B, H, W, 3·C] laid out (3, G, D)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return q, k, v


def zero_dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    """Put zeros for the tokens of [B, H, W, ...] for which `keep` [B, H·W] is False; None for none."""
    if keep is None:
        return x
    return x.masked_fill(~keep.view(*x.shape[:3], *(1,) * (x.ndim - 3)), 0)
