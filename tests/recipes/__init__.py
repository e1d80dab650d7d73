"""Recipes: how to get each record of `tests/records` from the authors' code.

A file a family, with a table `RECIPES` of record names. `tests/make_record.py` runs them on a clone of the authors'
repository. A recipe may stand here without a record: then the record can be made whenever somebody needs it.
"""

from __future__ import annotations

import ast
import importlib.util
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


@dataclass(frozen=True)
class Source:
    """Whose code: the repository's address, the full hash of the commit (or "PyPI NAME VERSION"), and the license.

    A clone must be at `commit`; of a release on PyPI the folder is the one that pip installed it to.
    """

    repository: str
    commit: str
    license: str

    @property
    def release(self) -> tuple[str, ...]:
        """Name and version of a release on PyPI; empty for a commit."""
        return tuple(self.commit.split()[1:])


def nchw(output: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Keep an output that is a map [B, C, H, W] already, or that the record holds as it is."""
    return output


def nhwc(output: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return output.permute(0, 3, 1, 2)


def tokens(output: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """[B, H·W, C] -> [B, C, H, W], H and W being the image's divided by the power of two that fits (rounded up)."""
    for stride in (2**i for i in range(8)):
        height, width = (-(-size // stride) for size in image.shape[-2:])
        if height * width == output.shape[1]:
            return output.transpose(1, 2).unflatten(2, (height, width))
    raise ValueError(f"{output.shape[1]} tokens are no map of a picture of {image.shape[-2]}x{image.shape[-1]}")


def patches(output: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """[B, 1 + H·W, C] of a square map behind a class token -> [B, C, H, W]."""
    side = isqrt(output.shape[1] - 1)
    return output[:, 1:].transpose(1, 2).unflatten(2, (side, side))


@dataclass(frozen=True)
class Recipe:
    """One record: which code runs, on what, and what of it is kept.

    source: whose code.
    file: the file in the clone that holds the factory.
    factory: name in the file of the function or class that builds the model, or a function that is given the file's
        module and builds it; `kwargs` are the arguments.
    root: folder of the clone that its imports start from.
    image: shape of the input.
    features: names of the modules whose outputs are kept as feat0, feat1, …, laid out by `layout`; of an output that is
        a tuple the first value, or that of the number after a colon: "blocks.0:1".
    constants: endings of the names of tensors that the model computes itself (index tables, masks); not filled.
    filled: endings of the names of other buffers that are filled by their names as parameters are.
    run: (model, image) -> named arrays, in place of `{"logits": model(image)}`.
    gradients: `run` takes gradients, for which what a backward pass needs is kept.
    stress: factors of a second run with the parameters of these endings multiplied (see golden.py), and its arrays.
    stand_ins: modules that the file imports and that are replaced: their names and values. Names left out are accepted
        by the import and must not matter to the run.
    packages: run the `__init__.py` of the file's packages; else the packages are there, empty.
    change: takes from the model what the record leaves out.
    notes: what is replaced and why, for the record.
    """

    source: Source
    file: str
    factory: str | Callable[..., nn.Module]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    root: str = ""
    image: tuple[int, ...] = (2, 3, 224, 224)
    features: tuple[str, ...] = ()
    layout: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nchw
    constants: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    run: Callable[[nn.Module, torch.Tensor], Mapping[str, torch.Tensor]] | None = None
    gradients: bool = False
    stress: tuple[tuple[str, float], ...] = ()
    stand_ins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    packages: bool = False
    change: Callable[[nn.Module], None] | None = None
    notes: str = ""


def drawn(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw standard normal values, rounded to float32, as float64."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32)).double()


def stages(pattern: str, depths: tuple[int, ...], first: int = 0) -> tuple[str, ...]:
    """Return the names of the last block of each stage: `{}` in the pattern is the stage, `{last}` the block."""
    return tuple(pattern.format(stage, last=depth - 1) for stage, depth in enumerate(depths, first))


class Projected(nn.Module):
    """Projections around attention of q, k and v [B, G, N, D], on [B, N, C]."""

    def __init__(self, attention: nn.Module, dim: int = 12, num_heads: int = 3):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.attention, self.proj = nn.Linear(dim, 3 * dim), attention, nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attention(q, k, v).transpose(1, 2).flatten(2))


def beside(module: types.ModuleType, path: str) -> types.ModuleType:
    """Load another file of the clone, by its path from the folder of the recipe's file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(module.__file__).parent / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def class_of_script(script: str, name: str) -> Callable[..., nn.Module]:
    """Return what builds a class of a script beside the recipe's file; the rest of the script is not run."""

    def build(module: types.ModuleType, **kwargs: Any) -> nn.Module:
        tree = ast.parse(Path(module.__file__).with_name(script).read_text())
        (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        space = {**vars(module), "nn": nn, "torch": torch}
        exec(compile(ast.Module([found], []), script, "exec"), space)
        return space[name](**kwargs)

    build.__name__ = name
    return build


def uncast(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Run a model whose code casts to float32 on the way: without these casts, for float64's digits."""
    with patch.object(torch.Tensor, "float", lambda value: value):
        return model(image)


def features_only(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a backbone of which the features alone are kept."""
    model(image)
    return {}


class Unused:
    """A name that the authors' file imports and the run does not need. As a decorator it changes nothing."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, name: str) -> Unused:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unused(f"{self.name}.{name}")

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and isinstance(args[0], type | types.FunctionType) else self


def recipes(family: str) -> dict[str, Recipe]:
    """Return the family's recipes by the names of their records."""
    return importlib.import_module(f"recipes.{family}").RECIPES
