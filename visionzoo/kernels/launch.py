"""What the launches of Triton kernels share; plain torch, imported by `<op>/triton.py` alone."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzoo.kernels.dispatch import MAX_NUMBERS


def token_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return [B, H, W, G, D] and the step from token to token, such that token t, head g is at t·step + g·D.

    Maps and parts of projections lie like this and come back as they are; others are copied, as is what is so far apart
    that its offsets take more than 32 bits.

    Raises:
        ValueError: if a sample's own numbers are too many for that.
    """
    x, step, head_step = head_rows(x)
    return (x, step) if head_step == x.shape[4] else (x.contiguous(), x.shape[3] * x.shape[4])


def head_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """Return [B, H, W, G, D] and steps between tokens and heads: token t, head g is at t·step + g·head_step.

    Parts of heads lie like this too.
    """
    batch, height, width, heads, head_dim = x.shape
    check_numbers("of a sample", height * width * heads * head_dim)
    if x.is_contiguous():  # the usual case, and cheap to tell
        return x, heads * head_dim, head_dim
    if width > 1:
        step = x.stride(2)
    elif height > 1:
        step = x.stride(1)
    else:
        step = x.stride(0) if batch > 1 else heads * head_dim
    head_step = x.stride(3) if heads > 1 else head_dim
    expected = (height * width * step, width * step, step, head_step, 1)
    near = max(height * width * step, heads * head_step) <= MAX_NUMBERS
    if near and all(size == 1 or s == e for size, s, e in zip(x.shape, x.stride(), expected, strict=True)):
        return x, step, head_step
    return x.contiguous(), heads * head_dim, head_dim


def check_numbers(what: str, count: int) -> None:
    """Check that a kernel can count so many numbers in 32 bits.

    Raises:
        ValueError: if it cannot.
    """
    if count > MAX_NUMBERS:
        raise ValueError(
            f"Triton kernels take up to {MAX_NUMBERS} numbers {what}, got {count}; use backend='reference'"
        )


def block_size(count: int, dtype: torch.dtype) -> int:
    """Side of the blocks for `count` rows of a dtype: 16 (the least of the matrix units), 32, or 64 in low precision.

    Few sizes, so that few kernels are ever compiled, whatever the image size. Exact float32 products work in the
    ordinary registers, which tiles of 64 × 64 overflow.
    """
    largest = 32 if dtype == torch.float32 else 64
    side = 16
    while side < min(count, largest):
        side *= 2
    return side


def head_block(head_dim: int) -> int:
    """Width of the blocks for heads of width `head_dim`: the next power of two from 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of float32 matrix products: what `torch.set_float32_matmul_precision` says; others are exact."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def blocks(rows: int, block: int) -> int:
    """⌈rows / block⌉."""
    return -(-rows // block)
