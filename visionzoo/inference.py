"""Everything that makes a trained model fast, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionzoo._torch_private import list_mode_options
from visionzoo.layers.fuse import fuse


class InferenceModel(nn.Module):
    """A model that `optimize_for_inference` made fast; all but calls goes to the model itself, `model`.

    Calls cast floating images to the model's dtype and record no gradients. Outside of the compiled part, so that
    neither an image's dtype nor the caller's grad mode costs a compilation.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.training = False

    def forward(self, *images: Tensor) -> Any:
        """Return what the model returns, in its dtype."""
        with torch.no_grad():
            return self.model(*(x.to(self.dtype) if x.is_floating_point() else x for x in images))

    def train(self, mode: bool = True) -> InferenceModel:
        """Stay in eval mode.

        Raises:
            RuntimeError: if asked for training mode.
        """
        if mode:
            raise RuntimeError("this model was optimized for inference: train the model that it was made from")
        return super().train(False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


@torch.no_grad()
def optimize_for_inference(
    model: nn.Module,
    *,
    example_input: Tensor | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    mode: str | None = "auto",
    **compile_options: Any,
) -> InferenceModel:
    """Return a copy of a model for fast inference, on the device where the model is; the model is not changed.

    The copy is fused (`visionzoo.fuse`) and in eval mode for good, has `dtype` and the memory format, and is compiled
    on a GPU. It takes images of any floating dtype, gives outputs of its own, and records no gradients.

    >>> import timm, torch, visionzoo
    >>> model = timm.create_model("zoo_levit_128s", num_classes=10)
    >>> fast = visionzoo.optimize_for_inference(model)
    >>> fast(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 10])

    Args:
        model: any module that takes images [B, C, H, W], such as a model or feature extractor of the zoo.
        example_input: an input, or its shape; run here, so that the first real image need not wait for the compilation.
        dtype: of weights and computation; None keeps the model's. torch.bfloat16 or torch.float16 is what GPUs are
            fastest with; check that the accuracy is what you need.
        channels_last: keep convolution weights in torch's channels_last format, as the zoo's maps are.
        mode: of torch.compile; None runs eagerly. "auto" is "reduce-overhead" on CUDA devices and None elsewhere,
            where compiling needs a C++ compiler: pass "default" if there is one. "reduce-overhead" replays CUDA
            graphs: the next call overwrites the last one's outputs (clone what you keep), and every new input shape
            is compiled and recorded again, so feed images of few sizes, or pass "default" and dynamic=True.
        compile_options: further arguments of torch.compile.

    Raises:
        ValueError: if `dtype` is not floating point, `example_input` is neither an image nor a shape of one, or there
            are options for a compilation that is not to be.
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
    fused: Any = fuse(model.model if isinstance(model, InferenceModel) else model).to(dtype=dtype)
    if channels_last:
        fused = fused.to(memory_format=torch.channels_last)
    own_dtype = next((p.dtype for p in fused.parameters()), dtype)
    if mode is not None:
        fused = torch.compile(fused, **_options(mode, compile_options))
    fast = InferenceModel(fused, own_dtype)
    if example is not None:
        for _ in range(3):  # compile, warm up, record the graph
            fast(example)
    return fast


def _options(mode: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of torch.compile, under which Inductor leaves memory formats as they are.

    It would have what comes before a convolution in channels_last, and takes [B, H, W, C] for [N, C, H, W]: maps would
    be turned around and back.
    """
    if given.get("backend", "inductor") != "inductor":
        return {"mode": mode, **given}
    options = {**list_mode_options(mode), "layout_optimization": False, **given.get("options", {})}
    return {**given, "options": options}


def _example(example: Tensor | Sequence[int] | None, device: torch.device) -> Tensor | None:
    if example is None:
        return None
    shape = tuple(example.shape if isinstance(example, Tensor) else example)
    if len(shape) != 4 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(
            f"optimize_for_inference: example_input must be an image [B, C, H, W] or its shape, got {shape}"
        )
    return example.to(device) if isinstance(example, Tensor) else torch.zeros(shape, device=device)
