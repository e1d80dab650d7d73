"""Everything that makes a trained model fast, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.layers.fuse import fuse


@torch.no_grad()
def optimize_for_inference(
    model: nn.Module,
    *,
    example_input: Tensor | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    mode: str | None = "auto",
    **compile_options: Any,
) -> nn.Module:
    """Return a copy of a model for fast inference, on the device where the model is; the model is not changed.

    The copy is fused (`visionzoo.fuse`: eval mode for good, no gradients for parameters), has `dtype` and the memory
    format, and is compiled on a GPU. Images of any floating dtype are cast to the copy's; outputs have it.

    >>> import timm, torch, visionzoo
    >>> model = timm.create_model("zoo_levit_128s", num_classes=10)
    >>> fast = visionzoo.optimize_for_inference(model)
    >>> fast(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 10])

    Args:
        model: any module that takes images [B, C, H, W], such as a model or feature extractor of the zoo.
        example_input: an input, or the shape of one in float32; run here, so that the first real image need not wait
            for the compilation.
        dtype: of weights and computation; None keeps the model's. On GPUs torch.bfloat16 or torch.float16 is two to
            three times as fast; check the accuracy you need.
        channels_last: keep convolution weights in torch's channels_last format, as the zoo's maps are.
        mode: of torch.compile; None runs eagerly. "auto" is "reduce-overhead" on CUDA devices and None elsewhere,
            where compiling needs a C++ compiler: pass "default" if there is one. "reduce-overhead" replays CUDA
            graphs: the next call overwrites the last one's outputs (clone what you keep), and every new input shape
            is compiled and recorded again, so feed images of few sizes, or pass "default" and dynamic=True.
        compile_options: further arguments of torch.compile.

    Raises:
        ValueError: if `dtype` is not floating point, `example_input` is no image or shape of one, or there are options
            for a compilation that is not to be.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if mode == "auto":
        mode = "reduce-overhead" if device.type == "cuda" else None
    if compile_options and mode is None:
        raise ValueError(
            f"optimize_for_inference: options of torch.compile need a mode, got {mode=} on {device} and "
            f"{compile_options}; pass mode='default'"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"optimize_for_inference: dtype must be floating point, got {dtype=}")
    example = _example(example_input, device)
    fast: Any = fuse(model).to(dtype=dtype)
    if channels_last:
        fast = fast.to(memory_format=torch.channels_last)
    if _cast_inputs not in fast._forward_pre_hooks.values():
        fast.register_forward_pre_hook(_cast_inputs)
    if mode is not None:
        fast = torch.compile(fast, mode=mode, **compile_options)
    if example is not None:
        for _ in range(3):  # compile, warm up, record the graph
            fast(example)
    return fast


def _example(example: Tensor | Sequence[int] | None, device: torch.device) -> Tensor | None:
    if example is None:
        return None
    shape = tuple(example.shape if isinstance(example, Tensor) else example)
    if len(shape) != 4 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(
            f"optimize_for_inference: example_input must be an image [B, C, H, W] or its shape, got {shape}"
        )
    return example.to(device) if isinstance(example, Tensor) else torch.zeros(shape, device=device)


def _cast_inputs(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next((p.dtype for p in model.parameters()), None)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
