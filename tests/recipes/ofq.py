"""OFQ: quantized layers, attention with and without reparameterized queries and keys, and what annealing freezes."""

import ast
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from timm.layers import to_2tuple
from torch import nn

from . import Recipe, Source
from .gates import normal, some

OFQ = Source("https://github.com/nbasyl/OFQ", "7ed37d1dd33d39395edbf49fcbbc52f678ecf961", "MIT")
MODULES = "src/quantization/modules"


@contextmanager
def on_cpu():
    """Let code that names CUDA run on the CPU, in float64."""
    zeros = torch.zeros

    def made(*size, device=None, **options):
        return zeros(*size, dtype=torch.float64, **options)

    with patch.object(torch, "zeros", made), patch.object(torch.Tensor, "cuda", lambda self: self):
        yield


def learned(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output, and gradients of its sum with drawn factors, once the scales have begun by the same input."""
    x = x.clone().requires_grad_()
    with on_cpu():
        model(x)
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        named = {"grad_x": x} | {f"grad/{name}": p for name, p in model.named_parameters() if p.requires_grad}
        total = (out * normal(4, out.shape)).sum()
        grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    scales = {f"state:{name}": p.detach() for name, p in model.named_parameters() if name.split(".")[-1] == "s"}
    found = {name: some(g) for name, g in zip(named, grads, strict=True) if g is not None}
    return {"out": some(out)} | found | scales


def in_training(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what `learned` does, in training."""
    return learned(model.train(), x)


def linear(module, name, dim, out, **options):
    """Build a quantized layer around torch's."""
    return getattr(module, name)(m=nn.Linear(dim, out), **options)


def conv(module, **options):
    """Build the quantized patch embedding."""
    return module.LSQ_QConv2d(m=nn.Conv2d(3, 4, 16, 16), **options)


def mlp(module, **options):
    """Build the quantized MLP."""
    inner = module.Mlp(12, 20)
    inner.drop = 0.0
    return module.QMLP(m=inner, **options)


def attention(module, name, **options):
    """Build attention of a plain transformer."""
    return getattr(module, name)(m=module.deit_attention(12, num_heads=3), **options)


def window(module, name, **options):
    """Build attention in shifted windows, with one scale where the code has one for each token of a window."""
    inner = module.ShiftedWindowAttention(12, [2, 2], [1, 1], 3)
    built = getattr(module, name)(m=inner, **options)
    for part in built.modules():
        if type(part).__name__ == "LsqQuantizer":
            part.per_channel = False
    return built


class Rows(nn.Module):
    """A weight that three quantizers take in turn."""

    def __init__(self, quantizers):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 40))
        self.quantizers = nn.ModuleList(quantizers)

    def forward(self, x):
        """Quantize."""
        return torch.stack([quantizer(self.weight) for quantizer in self.quantizers]) * x


def statsq(module):
    """Build quantizers of 2, 3 and 4 bits."""
    return Rows([module.StatsQuantizer(bits, False) for bits in (2, 3, 4)])


class Freezing(nn.Module):
    """Which of drawn weights the function of a script freezes."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(24, 64))


def freezing(module):
    """Take the function that chooses from the script, which is not run."""
    path = Path(module.__file__).parents[3] / "cga.py"
    name = "freeze_outside_boundary_weight_idx"
    (found,) = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name)
    space = {"torch": torch, "np": np}
    exec(compile(ast.Module([found], []), str(path), "exec"), space)
    return Freezing(space[name])


def frozen(model, _):
    """Return the weights that are frozen, as ones."""
    cases = [(bits, margin) for bits in (2, 3, 4) for margin in (0.005, 0.05)]
    return {f"frozen_{bits}_{margin}": model.function(model.weight, bits, margin) for bits, margin in cases}


def recipe(file, factory, image=(2, 5, 12), **options):
    """Return the recipe of a part."""
    extra = {name: options.pop(name) for name in ("run", "constants") if name in options}
    names = {"to_2tuple": to_2tuple, "trunc_normal_": nn.init.trunc_normal_}
    return Recipe(
        OFQ,
        f"{file}.py",
        factory,
        options,
        image=image,
        run=extra.get("run", learned),
        gradients=True,
        constants=("clip_val", "relative_position_index", *extra.get("constants", ())),
        stand_ins={
            "imp": {},
            "timm.models.helpers": {},
            "timm.models.layers": names,
            "timm.models.registry": {"register_model": lambda function: function},
        },
        notes="scales of LSQ begin by a first pass over the same image; tensors that the code makes on CUDA are the "
        "CPU's, in float64; gradients are of the sum of out * RandomState(4).standard_normal(its shape)",
    )


BITS = {"weight_bits": 2, "input_bits": 2}
EIGHT = {"weight_bits": 8, "input_bits": 8, "weight_quant_method": "lsq"}
RECIPES = {
    "statsq": recipe("src/quantization/quantizer/statsq", statsq, (3, 6, 40)),
    "linear": recipe(f"{MODULES}/qlinear", linear, name="QLinear", dim=12, out=8, weight_bits=3, input_bits=2),
    "linear_unsigned": recipe(f"{MODULES}/qlinear", linear, name="QLinear", dim=12, out=8, symmetric=False, **BITS),
    "linear_lsq": recipe(
        f"{MODULES}/qlinear",
        linear,
        name="LSQ_w_and_act_QLinear",
        dim=12,
        out=8,
        weight_bits=3,
        input_bits=3,
        weight_quant_method="lsq",
    ),
    "head": recipe(f"{MODULES}/qlinear", linear, (4, 12), name="LSQ_QLinear4head", dim=12, out=8, **EIGHT),
    "conv": recipe(
        f"{MODULES}/qlinear", conv, (1, 3, 224, 224), constants=("move_b4.bias", "move_aft.bias", "signed"), **EIGHT
    ),
    "mlp": recipe(f"{MODULES}/qlinear", mlp, **BITS),
    "attention": recipe(f"{MODULES}/attention", attention, name="QAttention", **BITS),
    "attention_4": recipe(f"{MODULES}/attention", attention, name="QAttention", weight_bits=4, input_bits=4),
    "attention_qk": recipe(f"{MODULES}/attention", attention, name="QAttention_qkreparam", **BITS),
    "attention_qk_annealed": recipe(
        f"{MODULES}/attention", attention, name="QAttention_qkreparam_4_cga", run=in_training, **BITS
    ),
    "window": recipe(f"{MODULES}/swin_attention_and_mlp", window, (1, 4, 6, 12), name="QAttention_swin", **BITS),
    "window_qk": recipe(
        f"{MODULES}/swin_attention_and_mlp", window, (1, 4, 6, 12), name="QAttention_swin_qkreparam", **BITS
    ),
    "frozen": recipe("src/quantization/quantizer/statsq", freezing, (1,), run=frozen),
}
