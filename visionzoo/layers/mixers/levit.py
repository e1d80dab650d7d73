"""Attention with learned biases for offsets (LeViT, arXiv:2104.01136)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.layers.attention import attend
from visionzoo.layers.conv_norm import LinearNorm
from visionzoo.layers.mixers.base import Mixer


class LevitMixer(Mixer):
    """Every token attends to every token, with a bias for how far apart they are; O(N²·C), and an N×N bias a head.

    Each linear layer is followed by batch normalisation, and an activation comes before the output projection, so a
    block needs no norm of its own. Queries and keys are narrower than values. Softmax and sums are float32 at least;
    the bias is added in the dtype of the queries.

    The table of biases holds one value for each head and |Δy|, |Δx| on a map of `map_size`. For a map of another size
    it is resized linearly, the largest offset of the one map being that of the other.

    Args:
        dim: channels C.
        num_heads: attention heads; they need not divide `dim`.
        key_dim: width of a head's queries and keys.
        attn_ratio: width of a head's values over `key_dim`.
        map_size: side of the map that the table is for, or (height, width); 14 at 224 px and stride 16.
        stride: take every stride-th row and column of the map for queries, which shrinks the map. Other than 1 only
            in place of downsampling.
        out_dim: channels of the output; None means `dim`.
        act_layer: activation before the output projection.
        zero_init: start the norm after the output projection at 0, so that a residual branch starts as nothing.

    Raises:
        ValueError: if a width, size or stride is not positive.

    >>> import torch
    >>> LevitMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    NO_WEIGHT_DECAY = ("bias_table",)
    offsets: Tensor
    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        key_dim: int = 16,
        attn_ratio: float = 2.0,
        map_size: int | tuple[int, int] = 14,
        stride: int = 1,
        out_dim: int | None = None,
        act_layer: type[nn.Module] = nn.Hardswish,
        zero_init: bool = False,
    ):
        super().__init__(dim, num_heads, head_dim=int(key_dim * attn_ratio))
        self.key_dim = key_dim
        self.stride = stride
        self.out_dim = dim if out_dim is None else out_dim
        self.map_size: tuple[int, int] = to_2tuple(map_size)
        if min(key_dim, self.head_dim, stride, self.out_dim, *self.map_size) < 1:
            raise ValueError(
                f"LevitMixer: key_dim, key_dim·attn_ratio, map_size, stride and out_dim must be positive, "
                f"got {key_dim=}, {attn_ratio=}, {map_size=}, {stride=} and {out_dim=}"
            )
        if stride == 1:
            self.qkv = LinearNorm(dim, self.num_heads * (2 * key_dim + self.head_dim))
        else:
            self.q = LinearNorm(dim, self.num_heads * key_dim)
            self.kv = LinearNorm(dim, self.num_heads * (key_dim + self.head_dim))
        self.act = act_layer()
        self.proj = LinearNorm(self.num_heads * self.head_dim, self.out_dim, norm_weight=0.0 if zero_init else 1.0)
        self.bias_table = nn.Parameter(torch.zeros(self.num_heads, self.map_size[0] * self.map_size[1]))
        self.register_buffer("offsets", self._offsets(), persistent=False)
        self.register_buffer("bias", None)  # see `precompute`

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, ⌈H / stride⌉, ⌈W / stride⌉, out_dim]."""
        self.check_input(x)
        heads = (self.num_heads, -1)
        if self.stride == 1:
            size = x.shape[1:3]
            q, k, v = self.qkv(x).unflatten(-1, heads).split([self.key_dim, self.key_dim, self.head_dim], dim=-1)
        else:
            queries = x[:, :: self.stride, :: self.stride]
            size = queries.shape[1:3]
            q = self.q(queries).unflatten(-1, heads)
            k, v = self.kv(x).unflatten(-1, heads).split([self.key_dim, self.head_dim], dim=-1)
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # [B, G, N, D]
        bias = self._bias((x.shape[1], x.shape[2]), q.dtype)
        out = attend(q, k, v, bias=bias[None], scale=self.key_dim**-0.5)
        return self.proj(self.act(out.transpose(1, 2).flatten(2).unflatten(1, size)))

    def init_non_persistent_buffers(self) -> None:
        """Compute anew what no checkpoint holds, where timm and transformers built the model on the meta device."""
        self.offsets.copy_(self._offsets(self.offsets.device))

    def _offsets(self, device: torch.device | None = None) -> Tensor:
        # Rows of a multiple of 16 numbers: of masks that lie otherwise attention makes a copy in every call.
        index = offset_index(self.map_size, self.stride, device)
        return F.pad(index, (0, -index.shape[1] % 16))

    @torch.no_grad()
    def precompute(self) -> None:
        """Keep the biases of the map that the table is for, for inference with these weights (`visionzoo.fuse`)."""
        self.bias = self.bias_table[:, self.offsets]

    def _bias(self, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
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
