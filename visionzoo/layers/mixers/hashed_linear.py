"""Linear attention between binary codes of the tokens (EcoFormer, arXiv:2209.09004)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.hashing import KernelHash
from visionzoo.layers.mixers.base import Mixer


class HashedLinearMixer(Mixer):
    """Every token attends to every token by the products of their binary codes.

        yᵢ = (hᵢ·(Σⱼ hⱼ vⱼᵀ) + c·vᵢ) / (hᵢ·Σⱼ hⱼ + N·c), h binary codes

    Time: O(N·C·(bits + anchors)); memory: O(N·(C + G·(bits + anchors))).

    Queries and keys are one projection, whose heads are brought to length 1 and hashed to codes h of `num_bits` bits.
    With c = num_bits + 1 the output is (h·(Σ h vᵀ) + c·v) / (h·(Σ h) + N·c), the sums over all tokens. As released, the
    constant of the numerator belongs to the token's own value alone, while the products h·h + c, which are positive
    weights, would have it with all. Codes, sums and states are float32 at least, whatever the input. The hash functions
    are buffers: random at first, fitted by `visionzoo fit-hashes`.

    Facts from https://github.com/ziplab/EcoFormer at a277f9e (Apache-2.0).

    Args:
        dim: channels C.
        num_heads: attention heads.
        num_bits: bits of a code.
        num_anchors: anchors that a head's tokens are compared with for their codes.
        qkv_bias: whether the projections have a bias.

    Raises:
        ValueError: if one of the numbers is not positive.

    >>> import torch
    >>> HashedLinearMixer(64, 2)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        num_bits: int = 16,
        num_anchors: int = 25,
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        if num_bits < 1 or num_anchors < 1:
            raise ValueError(
                f"HashedLinearMixer: num_bits and num_anchors must be positive, got {num_bits=} and {num_anchors=}"
            )
        self.qk = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.hash = KernelHash(self.num_heads, self.head_dim, num_bits=num_bits, num_anchors=num_anchors)
        self.proj = nn.Linear(dim, dim)

    @property
    def takes_prefix_tokens(self) -> bool:
        """Yes: any set of tokens will do."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        qk, v = self.qk(x), self.v(x)
        dtype = torch.promote_types(qk.dtype, torch.float32)
        with without_autocast(x.device):
            # [B, H, W, C] -> [B, G, N, D]
            qk, values = (
                t.unflatten(-1, (self.num_heads, self.head_dim)).flatten(1, 2).transpose(1, 2).to(dtype)
                for t in (qk, v)
            )
            codes = self.hash(F.normalize(qk, dim=-1))
            constant = self.hash.num_bits + 1
            sums = codes @ (codes.mT @ values) + constant * values
            out = sums / (codes @ codes.sum(2).unsqueeze(-1) + codes.shape[2] * constant)
        return self.proj(out.transpose(1, 2).reshape(x.shape).to(v.dtype))
