"""What the launches of Triton kernels share; plain torch, imported by `<op>/triton.py` alone."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """Return x, or a copy where its last axis is not contiguous: kernels read rows of D numbers."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_strides(*tensors: Tensor) -> list[int]:
    """Strides of all axes but the last, tensor after tensor."""
    return [stride for x in tensors for stride in x.stride()[:-1]]


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


def warps(rows: int, columns: int) -> int:
    """Warps for a program whose largest tile is rows × columns."""
    return max(1, min(4, rows * columns // 1024))
