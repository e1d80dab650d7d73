"""Super token attention (STViT, arXiv:2211.11167)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from visionzoo.kernels.precision import without_autocast
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.mixers.full import FullMixer
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.layers.padding import crop, neighbors, pad_to_multiple


class SuperTokenMixer(Mixer):
    """Tokens are gathered into super tokens, one for each cell of the map, which attend to each other.

        y = Q·attention(Qᵀ x / Qᵀ 1), Q the memberships of tokens in super tokens

    Time: O(N·C²/s² + N·9·C + N²·C/s⁴); memory: O(N·C).

    A super token starts as the mean of its cell of s² tokens. Each token then belongs, by a softmax over products with
    the 9 super tokens around it, to all of them, and a super token becomes the mean of what belongs to it. After their
    attention the same memberships bring them back to the tokens. No gradient passes through the memberships.

    Softmax is float32 at least. As released, a map that the cells do not divide is
    padded with zeros at the bottom and right, which belong to super tokens too, and so do super tokens of zeros around
    the map, whose share is lost.

    Facts from https://github.com/hhb072/STViT at c9ed9a4 (no license).

    Args:
        dim: channels C.
        num_heads: heads of the attention between super tokens.
        token_size: side s of the cells in tokens, or (height, width); 1 for attention between the tokens themselves.
        num_iterations: how often the memberships are computed, from super tokens that get better each time.
        refinement: what super tokens do: "attention", "convolution" (1×1, depthwise 5×5, 1×1), or None for nothing.
        qkv_bias: whether the projection to q, k, v has a bias.

    Raises:
        ValueError: if a number is not positive or the refinement is unknown.

    >>> import torch
    >>> SuperTokenMixer(64, 2, token_size=4)(torch.randn(1, 5, 7, 64)).shape
    torch.Size([1, 5, 7, 64])
    """

    REFINEMENTS = ("attention", "convolution", None)

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        token_size: int | tuple[int, int] = 8,
        num_iterations: int = 1,
        refinement: str | None = "attention",
        qkv_bias: bool = True,
    ):
        super().__init__(dim, num_heads)
        self.token_size: tuple[int, int] = to_2tuple(token_size)
        if min(self.token_size) < 1 or num_iterations < 1:
            raise ValueError(
                f"SuperTokenMixer: token_size and num_iterations must be positive, got {token_size=} and "
                f"{num_iterations=}"
            )
        if refinement not in self.REFINEMENTS:
            raise ValueError(f"SuperTokenMixer: unknown {refinement=}, expected one of {self.REFINEMENTS}")
        self.num_iterations = num_iterations
        self.refine: nn.Module = nn.Identity()
        if refinement == "attention":
            self.refine = _HeadsFirstAttention(dim, num_heads, qkv_bias=qkv_bias)
        elif refinement == "convolution":
            self.refine = nn.Sequential(nn.Linear(dim, dim), DepthwiseConvNHWC(dim, 5), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        self.check_input(x)
        if self.token_size == (1, 1):
            return self.refine(x)
        (height, width), size = self.token_size, x.shape[1:3]
        x = pad_to_multiple(x, self.token_size).unflatten(2, (-1, width)).unflatten(1, (-1, height))
        pixels = x.transpose(2, 3).flatten(3, 4)  # [B, h, w, s², C]
        fixed = pixels.detach()  # memberships have no derivative, in no mode
        membership = self._membership(fixed, fixed.mean(3))
        for _ in range(self.num_iterations - 1):
            membership = self._membership(fixed, _gather(fixed, membership))
        tokens = self.refine(_gather(pixels, membership))
        out = membership.to(x.dtype) @ _around(tokens)
        out = out.unflatten(3, (height, width)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return crop(out, size).contiguous()

    def _membership(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """How far each of [B, h, w, s², C] belongs to the 9 tokens of [B, h, w, C] around it: [B, h, w, s², 9]."""
        products = (pixels * self.dim**-0.5) @ _around(tokens).mT
        return products.to(torch.promote_types(products.dtype, torch.float32)).softmax(-1)


class _HeadsFirstAttention(FullMixer):
    """Global attention whose projection to q, k, v is laid out (G, 3, D), as released."""

    QUANTIZES = False  # queries and keys are looked for in the usual order

    def split_heads(self, qkv: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(-2)
        return q, k, v


def _gather(pixels: Tensor, membership: Tensor) -> Tensor:
    """Mean of the pixels that belong to each token, [B, h, w, C]."""
    with without_autocast(pixels.device):  # gradients of tokens that get next to nothing pass what half precision holds
        parts = membership.mT @ pixels.to(membership.dtype)  # [B, h, w, 9, C], for the 9 neighbors
    shares = membership.sum(3).unsqueeze(-1)  # [B, h, w, 9, 1]
    # what was given to the i-th neighbor comes from the place to which one is the (8 - i)-th
    total, share = (
        torch.stack([neighbors(part.select(3, i))[8 - i] for i in range(9)]).sum(0) for part in (parts, shares)
    )
    return (total / (share + 1e-12)).to(pixels.dtype)


def _around(tokens: Tensor) -> Tensor:
    """[B, h, w, C] to [B, h, w, 9, C]: the 3×3 around each, with zeros around the map."""
    return torch.stack(neighbors(tokens), dim=3)
