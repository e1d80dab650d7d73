"""What every token mixer is: [B, H, W, C] -> [B, H, W, C], any height and width."""

from __future__ import annotations

from timm.layers import register_notrace_module
from torch import Tensor, nn

HEAD_DIM = 32  # head width where neither the caller nor the family says otherwise: that of most families here


@register_notrace_module  # shapes steer mixers (padding, regions), so torch.fx sees each as one node
class Mixer(nn.Module):
    """Base of the token mixers.

    Args:
        dim: channels C of the map.
        num_heads: attention heads; None means dim // 32 or the next smaller number that divides dim, at least one.
            Mixers without heads ignore it.
        head_dim: width of a head where the mixer has its own; None means dim / num_heads.

    Raises:
        ValueError: if the heads do not divide the channels that they share.
    """

    stride = 1  # what the map shrinks by

    def __init__(self, dim: int, num_heads: int | None = None, *, head_dim: int | None = None):
        super().__init__()
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

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views q, k, v, each [B, H, W, G, D], of a projection [B, H, W, 3·C] laid out (3, G, D)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return q, k, v
