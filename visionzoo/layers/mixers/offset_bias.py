"""Biases of attention for how far apart two tokens are, from one table for all places (LeViT, arXiv:2104.01136)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.layers.mixers.base import Mixer


class OffsetBiasMixer(Mixer):
    """Base of mixers with a learned number for each head and |Δy|, |Δx| on a map of `map_size`.

    For a map of another size the table is resized linearly, the largest offset of the one map being that of the other.

    Args:
        dim: channels C.
        num_heads: attention heads G.
        head_dim: as in `Mixer`.
        map_size: side of the map that the table is for, or (height, width).
        stride: queries stand on every stride-th row and column.

    Raises:
        ValueError: if the map has no tokens.
    """

    NO_WEIGHT_DECAY: tuple[str, ...] = ("bias_table",)
    offsets: Tensor
    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        head_dim: int | None = None,
        map_size: int | tuple[int, int] = 14,
        stride: int = 1,
    ):
        super().__init__(dim, num_heads, head_dim=head_dim)
        self.map_size: tuple[int, int] = to_2tuple(map_size)
        if min(self.map_size) < 1:
            raise ValueError(f"{type(self).__name__}: map_size must be positive, got {map_size=}")
        self.stride = stride
        self.bias_table = nn.Parameter(torch.zeros(self.num_heads, self.map_size[0] * self.map_size[1]))
        self.register_buffer("offsets", self._offsets(), persistent=False)
        self.register_buffer("bias", None)  # see `precompute`
        self.register_load_state_dict_post_hook(_init_buffers)  # also where it was built on the meta device

    def init_non_persistent_buffers(self) -> None:
        """Compute anew what no checkpoint holds, where the mixer was built on the meta device."""
        offsets = self._offsets(self.bias_table.device)
        if self.offsets.device == offsets.device:
            self.offsets.copy_(offsets)  # in place: CUDA graphs know where it is
        else:
            self.offsets = offsets

    def _offsets(self, device: torch.device | None = None) -> Tensor:
        # Rows of a multiple of 16 numbers: of masks that lie otherwise attention makes a copy in every call.
        index = offset_index(self.map_size, self.stride, device)
        return F.pad(index, (0, -index.shape[1] % 16))

    @property
    def pair_bytes(self) -> int:
        """Biases, in half precision at least, and where they stand in the table, in eight bytes."""
        return (8 + 2 * self.num_heads) // self.stride**2

    @torch.no_grad()
    def precompute(self) -> None:
        """Keep the biases of the map that the table is for, for inference with these weights (`visionzoo.fuse`)."""
        self.bias = self.bias_table[:, self.offsets]

    def offset_bias(self, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Biases [G, queries, keys] of a map of (height, width)."""
        if self.bias is not None and not isinstance(size[0], torch.SymInt) and size == self.map_size:
            bias = self.bias.to(dtype)
        elif not torch.compiler.is_compiling() and size == self.map_size:
            table = self.bias_table.to(dtype)
            if torch.is_grad_enabled():
                bias = table[:, self.offsets]
            else:  # a quarter of the time on CPUs; but its gradient does not repeat bit for bit on GPUs
                bias = table.index_select(1, self.offsets.flatten()).unflatten(1, self.offsets.shape)
        else:  # Under torch.compile a test on symbolic sizes would cost a recompilation; resizing to itself is exact.
            table = self.bias_table.unflatten(1, self.map_size)
            table = F.interpolate(table[None], size=size, mode="bilinear", align_corners=True)[0]
            bias = table.to(dtype).flatten(1)[:, offset_index(size, self.stride, table.device)]
        return bias[..., : size[0] * size[1]]


def _init_buffers(mixer: OffsetBiasMixer, _: object) -> None:
    mixer.init_non_persistent_buffers()


def offset_index(size: tuple[int, int], stride: int = 1, device: torch.device | None = None) -> Tensor:
    """Where the offsets of a map's token pairs stand in a table that counts |Δy|, |Δx| row by row.

    Args:
        size: (height, width) of the map.
        stride: queries stand on every stride-th row and column.
        device: of the result.

    Returns:
        int64 [N / stride² (rounded up on each axis), N], tokens numbered row by row.
    """
    rows, columns = (torch.arange(n, device=device) for n in size)
    rows, columns = ((p[::stride, None] - p).abs() for p in (rows, columns))  # [queries, keys] along each axis
    index = rows[:, None, :, None] * size[1] + columns[None, :, None, :]  # [query y, query x, key y, key x]
    return index.flatten(2).flatten(0, 1)
