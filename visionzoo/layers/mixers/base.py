"""What every token mixer is: [B, H, W, C] -> [B, H, W, C], any height and width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.layers.tracing import one_node

HEAD_DIM = 32  # head width where neither the caller nor the family says otherwise: that of most families here


class Mixer(nn.Module):
    """Base of the token mixers; `forward` of each begins with `check_input`.

    Args:
        dim: channels C of the map.
        num_heads: attention heads; None means dim // 32 or the next smaller number that divides dim, at least one.
            Mixers without heads ignore it.
        head_dim: width of a head where the mixer has its own; None means dim / num_heads.

    Raises:
        ValueError: if the heads do not divide the channels that they share.
    """

    stride = 1  # what the map shrinks by
    needs_prefix_tokens = False  # whether it is one of tokens only, which has nothing to do on a map by itself

    @property
    def takes_prefix_tokens(self) -> bool:
        """Whether tokens without a place on the map can take part, as further tokens: the class token and the like.

        So it is where a token's place does not matter. Other mixers see the map alone, and such tokens pass by.
        """
        return False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let torch.fx see each mixer as one node: shapes steer them (padding, regions)."""
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            cls.forward = one_node(cls.forward)  # type: ignore[method-assign]

    def __init__(self, dim: int, num_heads: int | None = None, *, head_dim: int | None = None):
        super().__init__()
        if dim < 1:
            raise ValueError(f"{type(self).__name__}: dim must be positive, got {dim=}")
        if num_heads is None:
            num_heads = next(heads for heads in range(max(1, dim // HEAD_DIM), 0, -1) if dim % heads == 0)
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(
                f"{type(self).__name__}: num_heads must divide dim, got {dim=} and {num_heads=}; "
                f"pass a num_heads that divides {dim}"
            )
        self.dim = self.out_dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim

    def check_kernels(self, **kernels: int | None) -> None:
        """Check sizes of kernels that keep a map's size; None is for no kernel.

        Raises:
            ValueError: if one is even or not positive.
        """
        for name, kernel in kernels.items():
            if kernel is not None and (kernel < 1 or kernel % 2 == 0):
                raise ValueError(f"{type(self).__name__}: {name} must be odd and positive, got {name}={kernel}")

    def check_input(self, x: Tensor) -> None:
        """Check that x is a map this mixer takes: floating point [B, H, W, C], in the dtype of the weights.

        Under autocast the dtypes may differ.

        Raises:
            ValueError: if it is not.
        """
        if x.ndim != 4 or x.shape[3] != self.dim or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(
                f"{type(self).__name__}: expected a map [B, H, W, C] with C = {self.dim}, got {tuple(x.shape)}; "
                f"for maps [B, C, H, W] wrap the mixer in visionzoo.layers.mixers.MixerNCHW"
            )
        if torch.compiler.is_compiling():  # not every torch traces what follows, and its own error says enough
            return
        weight = next(self.parameters(), None)
        if weight is not None and weight.dtype == x.dtype:  # nearly always, and cheap
            return
        dtypes = {p.dtype for p in self.parameters() if p.is_floating_point()} or {x.dtype}
        if not x.is_floating_point() or (x.dtype not in dtypes and not _autocast_is_on(x.device)):
            raise ValueError(
                f"{type(self).__name__}: expected a floating point map in the dtype of the weights "
                f"({', '.join(sorted(map(str, dtypes)))}), got {x.dtype}; convert one, or run under torch.autocast"
            )

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views q, k, v, each [B, H, W, G, D], of a projection [B, H, W, 3·C] laid out (3, G, D)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return q, k, v


def _autocast_is_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
