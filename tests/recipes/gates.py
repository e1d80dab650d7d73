"""Gates: plug-in modules on maps [B, C, H, W], from the repositories of their authors.

Kept are the output and, where `gate` says so, the gradients of its sum with drawn factors. There is no code of the
authors of ELA: its records are of the class that public repositories copy from each other, with the paper's settings.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from . import Recipe, Source

A2N = Source("https://github.com/haoyuc/A2N", "210b38cbe721f0283aa5ad20c98373c5822f917a", "none given")
CBAM = Source("https://github.com/Jongchan/attention-module", "459efad0e05ee7dde50c41ca10a3d0800bc3792a", "MIT")
COORD = Source("https://github.com/houqb/CoordAttention", "7619bea9acbe260b3793833cc78cef3f124c8112", "MIT")
ECA = Source("https://github.com/BangguWu/ECANet", "b332f6b3e6e2afe8a3287dc8ee8440a0fbec74c4", "MIT")
EFFICIENT = Source("https://github.com/cmsflash/efficient-attention", "46a5f9eaf09470affb0ab30932b7748cc3c871ef", "MIT")
ELA = Source("https://github.com/zhxqaq/yolov8pose-ela", "06ddb2411e5eb01685d666897b2868c6efde6722", "AGPL-3.0")
MAGC = Source("https://github.com/wenwenyu/MASTER-pytorch", "7fe140fde6df13e6b184161fb6e2c3fd3a344948", "MIT")
PSA = Source("https://github.com/DeLightCMU/PSA", "20e307ad708ae6a39239aa50ffa32e0c36c92894", "Apache-2.0")
TRIPLET = Source("https://github.com/LandskapeAI/triplet-attention", "f07524e45db5eea1357c50316f30ab99a292d2f9", "MIT")
ULSAM = Source("https://github.com/Nandan91/ULSAM", "9a07d686b69ff41b6b640791719f6b6889eae84b", "none given")


def normal(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw standard normal values in float64."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)))


def some(values: torch.Tensor, count: int = 512) -> torch.Tensor:
    """Return all values in a row, or `count` of them at the places of `golden.sample`, with their graph."""
    flat = values.reshape(-1)
    return flat if len(flat) <= count else flat[np.random.RandomState(len(flat)).randint(0, len(flat), count)]


def changes(gate: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output, and what became of the input, to which it may be close."""
    out = gate(x)
    return {"out": some(out), "change": some(out - x), "ratio": some(out / x)}


def gradients(gate: nn.Module, x: torch.Tensor, parameters: bool = True) -> dict[str, torch.Tensor]:
    """Return the output, and the gradients of its sum with drawn factors for the input and for the parameters."""
    x = x.clone().requires_grad_()
    out = gate(x)
    named = {"grad_x": x} | {f"grad/{name}": value for name, value in gate.named_parameters() if parameters}
    grads = torch.autograd.grad((out * normal(4, out.shape)).sum(), list(named.values()))
    return {"out": some(out)} | {
        name: some(grad, 512 if name == "grad_x" else 64) for name, grad in zip(named, grads, strict=True)
    }


def gate(source: Source, file: str, factory: Any, root: str = "", stand_ins: Any = None, **kwargs: Any) -> Recipe:
    """Return the recipe of a gate of 32 channels, with its gradients."""
    options = {"run": gradients, "gradients": True, "stand_ins": stand_ins or {}}
    return Recipe(source, file, factory, kwargs, root, (2, 32, 5, 6), **options)


def larger(*args: Any, **kwargs: Any) -> Recipe:
    """Return the recipe of a gate of 64 channels, without gradients."""
    return replace(gate(*args, **kwargs), image=(2, 64, 28, 28), run=changes, gradients=False)


def ela(module, channel, kernel_size, groups, num_groups):
    """Build the copied class, whose groups are fixed and fit 256 channels, with layers of the paper's variants."""
    built = module.EfficientLocalizationAttention(256, kernel_size)
    built.conv = nn.Conv1d(channel, channel, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
    built.gn = nn.GroupNorm(num_groups, channel)
    return built


def a2n_m(module, nf):
    """Build the block with the 1x1 convolution that the file has in a comment."""
    built = module.AAB(nf)
    built.non_attention = nn.Conv2d(nf, nf, 1, bias=False)
    return built


cbam = partial(gate, CBAM, "MODELS/cbam.py", "CBAM", gate_channels=32)
eca = partial(gate, ECA, "models/eca_module.py", "eca_layer", channel=32)
efficient = partial(gate, EFFICIENT, "efficient_attention.py", "EfficientAttention", in_channels=32)
small_ela = partial(gate, ELA, "ultralytics/nn/modules/block.py", ela, channel=32)
magc = partial(gate, MAGC, "model/context_block.py", "MultiAspectGCAttention", inplanes=32, ratio=0.25, headers=4)
psa = {"root": "semantic-segmentation", "file": "network/PSA.py"}
a2n = {"source": A2N, "root": "code", "file": "model/aan.py"}
triplet = partial(gate, TRIPLET, "triplet_attention.py", "TripletAttention")
# the file sets a default type of tensors on the GPU when it is imported
on_cpu = {"stand_ins": {"torch": {**vars(torch), "set_default_tensor_type": lambda kind: None}}}
ulsam = partial(gate, ULSAM, "ulsam.py", "ULSAM", nin=32, nout=32, h=5, w=6, **on_cpu)

RECIPES = {
    "a2n_aab": Recipe(
        A2N,
        "model/aan.py",
        "AAB",
        {"nf": 24, "reduction": 4, "K": 2, "t": 30},
        root="code",
        image=(2, 24, 8, 10),
        run=lambda block, image: gradients(block, normal(1, image.shape), parameters=False),
        gradients=True,
        notes="the input is RandomState(1).standard_normal(input_shape) in float64, in place of the image",
    ),
    "a2n_m": gate(**a2n, factory=a2n_m, nf=32),
    "a2n_r2": gate(**a2n, factory="AAB", nf=32, reduction=2, t=5),
    "cbam": larger(CBAM, "MODELS/cbam.py", "CBAM", gate_channels=64, reduction_ratio=16, pool_types=["avg", "max"]),
    "cbam_all": cbam(pool_types=["avg", "max", "lp", "lse"], reduction_ratio=8),
    "cbam_channel": cbam(no_spatial=True),
    **{f"cbam_{kind}": cbam(pool_types=[kind]) for kind in ("avg", "lp", "lse", "max")},
    **{f"coord_{r}": gate(COORD, "coordatt.py", "CoordAtt", inp=32, oup=32, reduction=r) for r in (2, 32)},
    "eca": larger(ECA, "models/eca_module.py", "eca_layer", channel=64, k_size=3),
    **{f"eca_{k}": eca(k_size=k) for k in (3, 5, 7)},
    "efficient_attention": larger(
        EFFICIENT,
        "efficient_attention.py",
        "EfficientAttention",
        in_channels=64,
        key_channels=64,
        head_count=8,
        value_channels=64,
    ),
    "efficient_attention_1": efficient(key_channels=32, head_count=1, value_channels=32),
    "efficient_attention_4": efficient(key_channels=32, head_count=4, value_channels=32),
    "efficient_attention_wide": efficient(key_channels=16, head_count=4, value_channels=48),
    "ela_b": larger(ELA, "ultralytics/nn/modules/block.py", ela, channel=64, kernel_size=7, groups=64, num_groups=16),
    "ela_b_f64": small_ela(kernel_size=7, groups=32, num_groups=16),
    "ela_l_f64": small_ela(kernel_size=7, groups=4, num_groups=16),
    "ela_s_f64": small_ela(kernel_size=5, groups=4, num_groups=16),
    "ela_t_f64": small_ela(kernel_size=5, groups=32, num_groups=32),
    **{
        f"magc_{pooling}_{fusion}": magc(pooling_type=pooling, fusion_type=f"channel_{fusion}")
        for pooling in ("att", "avg")
        for fusion in ("add", "concat", "mul")
    },
    "pixel": gate(**a2n, factory="PA", nf=32),
    **{f"psa_{v}": larger(PSA, factory=f"PSA_{v}", inplanes=64, planes=64, **psa) for v in ("p", "s")},
    **{f"psa_{v}_f64": gate(PSA, factory=f"PSA_{v}", inplanes=32, planes=32, **psa) for v in ("p", "s")},
    "triplet": larger(TRIPLET, "triplet_attention.py", "TripletAttention"),
    "triplet_both": triplet(),
    "triplet_no_spatial": triplet(no_spatial=True),
    "ulsam": larger(ULSAM, "ulsam.py", "ULSAM", nin=64, nout=64, h=28, w=28, num_splits=4, **on_cpu),
    **{f"ulsam_{n}": ulsam(num_splits=n) for n in (1, 4, 8)},
}
