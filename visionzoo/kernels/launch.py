"""What the launches of Triton kernels share; plain torch, imported only by `<op>/triton.py`."""

from __future__ import annotations

import ctypes
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from visionzoo.kernels.dispatch import MAX_NUMBERS

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # of Triton before 3.4
    TensorDescriptor = None

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_MOST_COMPILED = 16384  # entries; a new size of a map adds one for each kernel, which is compiled for no size


def run(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Launch a kernel as `kernel[(programs,)](*args, **options)` does, at a fraction of its cost to the host.

    Triton finds the compiled kernel at every launch anew. Here it is kept for what it can depend on and more: values
    and types of numbers, dtypes of tensors, whether their addresses divide by 16, the device. On AMD GPUs, where sizes
    of tensors count too, Triton launches.

    Args:
        kernel: made by `triton.jit`.
        programs: how many to launch.
        *args: tensors, what `described` makes of them, numbers and None, in the order of the kernel's first parameters;
            at least one tensor.
        **options: the rest of its parameters, constants or numbers that it is not specialised for, and options of the
            compiler.
    """
    key = [id(kernel), *options, *options.values()]
    tensor = None
    for arg in args:
        kind = type(arg)
        if arg is None or kind is int or kind is float:
            key += (kind, arg)
        elif kind is TensorDescriptor:
            tensor = arg.base
            key += (tensor.dtype, *arg.block_shape)
        else:
            tensor = arg
            key += (arg.dtype, arg.data_ptr() & 15 == 0)
    key.append(tensor.get_device())  # type: ignore[union-attr]
    signature = tuple(key)
    if (kept := _compiled.get(signature)) is not None:
        compiled, constants = kept
        compiled[(programs, 1, 1)](*args, *constants)
        return
    with _may_load(tensor.device):  # type: ignore[union-attr]
        compiled = kernel[(programs,)](*args, **options)
    if compiled is None or torch.version.hip is not None:  # the interpreter compiles nothing
        return
    if len(_compiled) >= _MOST_COMPILED:
        _compiled.clear()
    names = list(inspect.signature(kernel.fn).parameters)[len(args) :]
    _compiled[signature] = compiled, tuple(options[name] for name in names)


@contextmanager
def _may_load(device: torch.device) -> Iterator[None]:
    """Let Triton load kernels although a CUDA graph is being recorded; loading launches nothing, but is refused there.

    That is what the driver has the call for. Without, every kernel would have to run before it is recorded, also those
    that only recordings run (`visionzoo.kernels.small_maps`).
    """
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_current_stream_capturing():
        yield
        return
    exchange = ctypes.CDLL(_DRIVER).cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(_RELAXED)
    exchange(ctypes.byref(mode))  # the thread's own mode comes back in its place
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def describes(x: Tensor, step: int) -> bool:
    """Whether the GPU copies blocks of the rows that `token_rows` gave by descriptors: from Hopper on, and aligned.

    Heads of another width than their block's would come with numbers of the next head.
    """
    bytes_apart = step * x.element_size()
    aligned = bytes_apart % 16 == 0 and x.data_ptr() % 16 == 0 and head_block(x.shape[-1]) == x.shape[-1]
    return TensorDescriptor is not None and x.element_size() == 2 and aligned and _copies_blocks(x.device)


@lru_cache
def _copies_blocks(device: torch.device) -> bool:
    if device.type != "cuda":
        return True  # the interpreter
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def described(x: Tensor, step: int, rows: int) -> Any:
    """Describe rows that `describes` to a kernel, which loads `rows` of one head at [sample, token, first number]."""
    batch, height, width, heads, head_dim = x.shape
    tokens = height * width
    return TensorDescriptor(x, [batch, tokens, heads * head_dim], [tokens * step, step, 1], [1, rows, head_dim])


def token_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return [B, H, W, G, D] and the step from token to token, such that token t, head g is at t·step + g·D.

    Maps and parts of projections lie like this and come back as they are; others are copied, as is what is so far apart
    that its offsets take more than 32 bits. Maps [B, H, W, C] count as such of one head.

    Raises:
        ValueError: if a sample's own numbers are too many for that.
    """
    (copied, step), _ = _steps(x.shape, x.stride())
    return (x.contiguous() if copied else x), step


def head_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """Return [B, H, W, G, D] and steps between tokens and heads: token t, head g is at t·step + g·head_step.

    Parts of heads lie like this too.
    """
    _, (copied, step, head_step) = _steps(x.shape, x.stride())
    return (x.contiguous() if copied else x), step, head_step


@lru_cache(maxsize=4096)
def _steps(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[bool, int], tuple[bool, int, int]]:
    """Whether to copy a map, and its steps then: for `token_rows` and for `head_rows`."""
    if len(shape) == 4:
        shape, strides = (*shape[:3], 1, shape[3]), (*strides[:3], shape[3], strides[3])
    batch, height, width, heads, head_dim = shape
    check_numbers("of a sample", height * width * heads * head_dim)
    contiguous = heads * head_dim, head_dim
    if width > 1:
        step = strides[2]
    elif height > 1:
        step = strides[1]
    else:
        step = strides[0] if batch > 1 else heads * head_dim
    head_step = strides[3] if heads > 1 else head_dim
    expected = (height * width * step, width * step, step, head_step, 1)
    near = max(height * width * step, heads * head_step) <= MAX_NUMBERS
    if 0 in shape or not near or any(n > 1 and s != e for n, s, e in zip(shape, strides, expected, strict=True)):
        return (True, contiguous[0]), (True, *contiguous)
    if head_step != head_dim:
        return (True, contiguous[0]), (False, step, head_step)
    return (False, step), (False, step, head_step)


def check_numbers(what: str, count: int) -> None:
    """Check that a kernel can count this many numbers in 32 bits.

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
