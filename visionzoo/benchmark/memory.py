"""Cases of memory: a training step at detection size against what it has to hold, and maps of growing size.

What a step has to hold at once (`held_bytes`) is what the implementation itself keeps, none of which is scratch space:

- weights, buffers and images, which are there all the time, and
- the larger of two things: what autograd has saved at the end of the forward pass (each storage once, whatever the
  number of views; weights and images not again), when there are no gradients yet; and all gradients of weights, at
  the end of the backward pass, when nothing saved is left.

So it is a lower bound of the peak for this implementation: a peak near it says that forward and backward need little
scratch space. It does not say that little is saved: for that compare the held bytes of two implementations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from visionzoo.benchmark.baselines import biformer_authors
from visionzoo.benchmark.cases import Case, Measurement, Run, Settings
from visionzoo.benchmark.models import autocast, storage_bytes, training_step
from visionzoo.benchmark.operations import token_cases
from visionzoo.kernels import use_backend


def memory_cases(settings: Settings) -> list[Case]:
    """List all cases of memory; BiFormer-S with 7 regions a side as on ImageNet and with 16 as on COCO."""
    steps = []
    for regions in (16, 7):
        builders = biformer_builders(regions)
        steps.append(step_case(settings, f"biformer_s-800x1333/regions-{regions}", builders, (800, 1333)))
    return [*steps, *token_cases(settings)]


def biformer_builders(regions: int) -> dict[str, Callable[[], nn.Module]]:
    """Return what builds BiFormer-S with that many regions a side: ours, ours in plain torch, the authors'."""
    ours = partial(timm.create_model, "zoo_biformer_s", regions=regions)
    return {
        "visionzoo": ours,
        "visionzoo-reference": lambda: _PlainTorch(ours()),
        "authors": partial(_authors_biformer_s, regions),
    }


class _PlainTorch(nn.Module):
    """A model all of whose operations run their references."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with use_backend("reference"):
            return self.model(x)


def _authors_biformer_s(regions: int) -> nn.Module:
    module: Any = biformer_authors("models.biformer")  # its factory of the variant has no argument for the regions
    return module.BiFormer(
        depth=[4, 4, 18, 4],
        embed_dim=[64, 128, 256, 512],
        mlp_ratios=[3, 3, 3, 3],
        n_win=regions,
        kv_downsample_mode="identity",
        kv_per_wins=[-1, -1, -1, -1],
        topks=[1, 4, 16, -2],
        qk_dims=[64, 128, 256, 512],
        head_dim=32,
        auto_pad=True,
    )


def step_case(
    settings: Settings, name: str, builders: Mapping[str, Callable[[], nn.Module]], size: tuple[int, int]
) -> Case:
    """Forward and backward under autocast of two images of a size."""
    batch = settings.batch or 2
    shape = f"{batch}x3x{size[0]}x{size[1]}"
    measurements = [
        Measurement(
            implementation, "training", partial(_prepare, settings, build, (batch, 3, *size)), items=batch, scale=3.0
        )
        for implementation, build in builders.items()
    ]
    return Case(name, batch, shape, "NCHW", "autocast bfloat16", measurements)


def _prepare(settings: Settings, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Run:
    with torch.device(settings.device):
        model, images = build().train(), torch.randn(shape)
    fixed = [*model.parameters(), *model.buffers(), images]

    def forward() -> Tensor:
        with autocast(images.device, True):
            return model(images)

    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = storage_bytes(fixed) + max(saved_bytes(forward, fixed), gradients)
    step = partial(training_step, model, images, lambda out: out.square().mean())
    return Run(step, fixed_bytes=storage_bytes(fixed), held_bytes=held)


def saved_bytes(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes that autograd holds at the end of `forward` for the backward pass, without the storages of `known`."""
    skipped = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # an object that only the graph refers to
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    alive = [tensor for ref in saved if (tensor := ref()) is not None]
    total = storage_bytes([t for t in alive if t.untyped_storage().data_ptr() not in skipped])
    del out
    return total
