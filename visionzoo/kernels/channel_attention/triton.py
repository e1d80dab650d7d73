"""Triton kernels of channel attention: two products, each of which is the other's gradient.

`_products` multiplies two maps over their tokens, to a small matrix of channels for each head; `_mix` multiplies the
channels of a map by such a matrix. Maps are read where they lie, once. Sums over tokens are cut into parts, which are
added up in one order: results are the same from run to run.

The matrices are float32; they enter products with low precision maps in the maps' dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionzoo.kernels import flops
from visionzoo.kernels.flash import load_rows, store_rows
from visionzoo.kernels.launch import blocks, dot_precision, head_block, run, token_rows
from visionzoo.kernels.operator import operator

_PROGRAMS = 1024  # about eight for each multiprocessor of a large GPU


def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attention of [B, H, W, G, D] as `channel_attention` says."""
    return _mix((_products(k, v) * scale).softmax(-1), q)


# -- operators --------------------------------------------------------------------------------------------------------


def _products_fake(x, y):
    batch, _, _, heads, head_dim = x.shape
    return x.new_empty((batch, heads, head_dim, head_dim), dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_products(ctx, grad):
    x, y = ctx.saved_tensors
    needs_x, needs_y = ctx.needs_input_grad
    return _mix(grad, y) if needs_x else None, _mix(grad.mT, x) if needs_y else None


@operator(
    "channel_products",
    fake=_products_fake,
    save=_save,
    differentiate=_differentiate_products,
    flops=flops.channel_products,
)
def _products(x: Tensor, y: Tensor) -> Tensor:
    """Σ x_nd · y_ne over the tokens n of [B, H, W, G, D] maps: [B, G, D, D] in float32."""
    call = _Call(x)
    batch, _, _, heads, head_dim = x.shape
    parts = torch.empty((call.parts, batch, heads, head_dim, head_dim), dtype=torch.float32, device=x.device)
    call.launch(_products_kernel, *token_rows(x), *token_rows(y), parts)
    return parts.sum(0) if call.parts > 1 else parts[0]


def _mix_fake(matrix, x):
    return x.new_empty(x.shape)


def _differentiate_mix(ctx, grad):
    matrix, x = ctx.saved_tensors
    needs_matrix, needs_x = ctx.needs_input_grad
    return _products(grad, x) if needs_matrix else None, _mix(matrix.mT, grad) if needs_x else None


@operator("channel_mix", fake=_mix_fake, save=_save, differentiate=_differentiate_mix, flops=flops.channel_mix)
def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """Σ matrix_de · x_ne over the channels e: [B, H, W, G, D] from [B, G, D, D] in float32 and x [B, H, W, G, D]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    head_dim = x.shape[4]
    strides = (1, head_dim) if matrix.mT.is_contiguous() else (head_dim, 1)
    _Call(x).launch(_mix_kernel, *token_rows(x), matrix if strides[0] == 1 else matrix.contiguous(), *strides, out)
    return out


class _Call:
    """A map's shape, and how its tokens are cut into parts of whole blocks."""

    def __init__(self, x: Tensor):
        batch, height, width, heads, head_dim = x.shape
        tokens, exact = height * width, x.dtype == torch.float32
        block = 16 if exact else 64  # exact products work in the ordinary registers, which larger blocks overflow
        part = blocks(blocks(tokens, blocks(_PROGRAMS, max(1, batch * heads))), block) * block
        self.parts = blocks(tokens, part)
        self.programs = self.parts * batch * heads
        self.sizes = tokens, part
        self.options = {
            "G": heads,
            "D": head_dim,
            "BLOCK_D": head_block(head_dim),
            "BLOCK_N": block,
            "PRECISION": dot_precision(x.dtype),
            "num_warps": min(8, head_block(head_dim) // 16) * (2 if exact else 1),
        }

    def launch(self, kernel, *tensors) -> None:
        """Run a kernel on every part of every head."""
        run(kernel, self.programs, *self.sizes, *tensors, **self.options)


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _part(tokens, part, G):
    """Head and sample of this program, and where its part of the tokens starts and ends; heads side by side."""
    g = tl.program_id(0) % G
    parts = tl.cdiv(tokens, part)
    first = tl.program_id(0) // G % parts * part
    return g, (tl.program_id(0) // (G * parts)).to(tl.int64), first, tl.minimum(first + part, tokens)


@triton.jit(do_not_specialize=["tokens", "part", "G"])
def _products_kernel(
    tokens, part, x, x_step, y, y_step, parts,
    G, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the channels of two maps over a part of the tokens."""
    g, b, first, end = _part(tokens, part, G)
    x += b * tokens * x_step + g * D
    y += b * tokens * y_step + g * D
    products = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        xs = load_rows(x, n, x_step, n < end, D, BLOCK_D)
        ys = load_rows(y, n, y_step, n < end, D, BLOCK_D)
        products += tl.dot(tl.trans(xs), ys, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    programs = tl.num_programs(0) // tl.cdiv(tokens, part)  # samples and heads
    parts += ((first // part).to(tl.int64) * programs + b * G + g) * D * D
    store_rows(parts, d, D, products, d < D, D, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "part", "G"])
def _mix_kernel(
    tokens, part, x, x_step, matrix, row_step, column_step, out,
    G, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply the channels of a part of the tokens by a matrix."""
    g, b, first, end = _part(tokens, part, G)
    x += b * tokens * x_step + g * D
    out += (b * tokens * G + g) * D
    d = tl.arange(0, BLOCK_D)
    inside = (d < D)[:, None] & (d < D)[None, :]
    # transposed: [channels in, channels out]
    at = matrix + (b * G + g) * D * D + d[:, None] * column_step + d[None, :] * row_step
    weights = tl.load(at, mask=inside, other=0.0).to(x.dtype.element_ty)
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        xs = load_rows(x, n, x_step, n < end, D, BLOCK_D)
        store_rows(out, n, G * D, tl.dot(xs, weights, input_precision=PRECISION), n < end, D, BLOCK_D)
