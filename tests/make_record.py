"""Make the records of `tests/records` from the authors' code, or check that the code still gives them.

    python tests/make_record.py swin --authors ~/Swin-Transformer ~/Swin-Transformer-Object-Detection --check

The clones must be at the commits that the recipes name (`tests/recipes/<family>.py`). Each record is one run in float64
on the CPU, with weights and image from `tests/golden.py`. A record that is there already is compared with the run, and
never replaced by other numbers: delete it first. Its keys that no run gives (paper, notes, reported numbers) stay.

This runs the authors' code: read it before. It needs timm and what their files import (einops, mostly); what cannot be
installed any more has a stand-in in the recipe, named in the record's `stand_ins`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import json
import math
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from golden import RECORDS, Record, fill, relative_error, sample
from recipes import FAMILIES, Recipe, Source, Unused, recipes
from torch import nn

LARGEST = 16_384  # values of an array that is kept whole; of larger ones, and of features, `golden.sample`
AGREES = 1e-12  # relative error of the same code run again in float64, on another machine


class RecordError(Exception):
    """The record cannot be made, or is not the stored one; the message says why and what to do."""


def find_clone(source: Source, folders: list[Path]) -> Path:
    """Return the folder that holds the source at its commit."""
    seen = []
    for folder in folders:
        if not folder.is_dir():
            raise RecordError(f"{folder}: no such folder. {how_to_get(source)}")
        seen.append(f"{folder} is at {(commit := state_of(folder, source))}")
        if commit == source.commit:
            return folder
    raise RecordError(f"no clone is at {source.commit} of {source.repository}: {'; '.join(seen)}. {how_to_get(source)}")


def state_of(folder: Path, source: Source) -> str:
    """Return the commit of a clone, or the release of a package, written as `Source.commit` writes it."""
    if source.release:
        name = source.release[0]
        found = [d.version for d in importlib.metadata.distributions(path=[str(folder)]) if d.name == name]
        return f"PyPI {name} {found[0]}" if found else f"no release of {name}"
    git = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "no commit (not a git repository)"


def how_to_get(source: Source) -> str:
    """Say where a clone comes from."""
    if source.release:
        return (
            f"Get it with: pip install {'=='.join(source.release)}, and pass the folder that it is in (site-packages)"
        )
    return f"Get it with: git clone {source.repository} CLONE && git -C CLONE checkout {source.commit}"


class StandIn(types.ModuleType):
    """A module in place of one that the authors' file imports."""

    def __getattr__(self, name: str) -> Unused:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unused(f"{self.__name__}.{name}")


@contextmanager
def authors_module(folder: Path, recipe: Recipe) -> Iterator[types.ModuleType]:
    """Import the recipe's file; on leaving, forget everything that came from the clone."""
    root = folder / recipe.root
    path = root / recipe.file
    if not path.is_file():
        raise RecordError(f"{folder} has no file {Path(recipe.root, recipe.file)}, which the recipe names")
    name = ".".join(Path(recipe.file).with_suffix("").parts)
    packages = [name.rsplit(".", i)[0] for i in range(name.count("."), 0, -1)]
    replaced = [m for m in sys.modules if m in recipe.stand_ins or m.split(".")[0] == name.split(".")[0]]
    before = {m: sys.modules.pop(m) for m in replaced}
    for module, names in recipe.stand_ins.items():
        sys.modules[module] = StandIn(module)
        vars(sys.modules[module]).update(names)
    for package in () if recipe.packages else packages:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(root.joinpath(*package.split(".")))]
    sys.path[:0] = search = [str(root), str(path.parent)]
    try:
        try:
            yield importlib.import_module(name)
        except ImportError as error:
            raise RecordError(
                f"{path} does not import: {error}. Install what it asks for, or, where that is not to be had any more, "
                "give the recipe a stand-in"
            ) from error
    finally:
        for entry in search:
            sys.path.remove(entry)
        for module, loaded in list(sys.modules.items()):
            origin = f"{vars(loaded).get('__file__')} {vars(loaded).get('__path__')}"
            if module in recipe.stand_ins or (str(folder) in origin and not recipe.source.release):
                del sys.modules[module]
        sys.modules.update(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out warnings: the authors' code calls timm and torch by names of their years."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_constant(name: str, recipe: Recipe) -> bool:
    """Say whether the model computes the tensor itself."""
    return name.endswith(recipe.constants)


def rows(model: nn.Module, recipe: Recipe) -> list[tuple[str, list[int], str]]:
    """Return name, shape and kind (param, stat, const) of every tensor of the state_dict."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = []
    for name, value in model.state_dict().items():
        if is_constant(name, recipe):
            kind = "const"
        elif name in parameters:
            kind = "param"
        elif name.endswith(("running_mean", "running_var", "num_batches_tracked", *recipe.filled)):
            kind = "stat"
        else:
            raise RecordError(
                f"buffer {name} is not a statistic of a norm: name its ending in the recipe's `constants` or `filled`"
            )
        state.append((name, list(value.shape), kind))
    return state


def load(model: nn.Module, state: list[tuple[str, list[int], str]], factors: tuple[tuple[str, float], ...] = ()):
    """Fill every tensor but constants by its name."""
    values = {}
    for name, shape, kind in state:
        if kind != "const":
            values[name] = torch.from_numpy(fill(name, shape))
            if kind == "param":
                values[name] *= next((factor for ending, factor in factors if name.endswith(ending)), 1)
    model.load_state_dict(values, strict=False)


def reached(outputs: list[torch.Tensor]) -> set[int]:
    """Return the ids of the parameters that the outputs' graphs lead to."""
    nodes, seen, found = [out.grad_fn for out in outputs], set(), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            nodes.extend(parent for parent, _ in node.next_functions)
    return found


def felt(parameter: nn.Parameter, model: nn.Module, recipe: Recipe, image: torch.Tensor, outputs: dict) -> bool:
    """Say whether the outputs change with a parameter that no graph leads to (eval() may have kept a copy)."""
    value = parameter.data.clone()
    parameter.data.mul_(2).add_(1)
    model.eval()
    changed = run(model, recipe, image)
    parameter.data.copy_(value)
    model.eval()
    return any(not changed[key].equal(output) for key, output in outputs.items())


def run(model: nn.Module, recipe: Recipe, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the outputs and features of one run, with their graphs; without gradients nothing is saved for them."""
    kept: dict[str, torch.Tensor] = {}

    def keep(key: str, item: int):
        def hook(module, args, output):
            value = output[item] if isinstance(output, tuple | list) else output
            kept[key] = recipe.layout(value, image).clone()  # authors' code may continue in place

        return hook

    hooks, modules = [], dict(model.named_modules())
    for i, feature in enumerate(recipe.features):
        name, _, item = feature.partition(":")
        if name not in modules:
            raise RecordError(f"the model has no module {name}, whose output the recipe keeps")
        hooks.append(modules[name].register_forward_hook(keep(f"feat{i}", int(item or 0))))
    forget = torch.autograd.graph.saved_tensors_hooks(lambda value: None, lambda value: value)
    with nullcontext() if recipe.gradients else forget:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # for tables that forward makes
        out = dict(recipe.run(model, image) if recipe.run else {"logits": model(image)})
        torch.set_default_dtype(default)
    for hook in hooks:
        hook.remove()
    return out | kept


def make(recipe: Recipe, folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Run the authors' code: what ran, and its arrays."""
    image = torch.from_numpy(np.random.RandomState(0).standard_normal(recipe.image).astype(np.float32)).double()
    with redirect_stdout(sys.stderr), quiet(), authors_module(folder, recipe) as module:
        torch.manual_seed(0)
        model = build(recipe, module)
        if recipe.change:
            recipe.change(model)
        model.double()
        state = rows(model, recipe)
        parameters = {name: value for name, value in model.named_parameters() if not is_constant(name, recipe)}
        arrays = {}
        for prefix, factors in (("", ()), ("stress_", recipe.stress)) if recipe.stress else (("", ()),):
            load(model, state, factors)
            model.eval()  # after filling: some models compute from their parameters here
            outputs = run(model, recipe, image)
            if not prefix:
                used = reached([value for value in outputs.values() if value.is_floating_point()])
                apart = [name for name, value in parameters.items() if id(value) not in used]
                unused = [name for name in apart if not felt(parameters[name], model, recipe, image, outputs)]
                shapes = {key: list(value.shape) for key, value in outputs.items()}
            for key, value in outputs.items():
                whole = "feat" not in key and value.numel() <= LARGEST
                arrays[prefix + key] = value.detach().numpy() if whole else sample(value.detach())
    meta = {
        "repository": recipe.source.repository,
        "commit": recipe.source.commit,
        "license": recipe.source.license,
        "file": str(Path(recipe.root, recipe.file)),
        "factory": recipe.factory if isinstance(recipe.factory, str) else described(recipe.factory),
        "factory_kwargs": json.loads(json.dumps(dict(recipe.kwargs), default=described)),
        "stand_ins": sorted(recipe.stand_ins),
        "dtype": "float64",
        "environment": {"torch": torch.__version__, "timm": importlib.metadata.version("timm"), "device": "cpu"},
        "input_shape": list(recipe.image),
        "num_params": sum(value.numel() for value in parameters.values()),
        "unused_parameters": unused,
        "shapes": shapes,
        "state": [list(row) for row in state],
    }
    if recipe.stress:
        meta["stress"] = {"factors": [list(factor) for factor in recipe.stress], "dtype": "float64"}
    if recipe.notes:
        meta["recipe_notes"] = recipe.notes
    return meta, arrays


def build(recipe: Recipe, module: types.ModuleType) -> nn.Module:
    """Call the factory."""
    if callable(recipe.factory):
        return recipe.factory(module, **recipe.kwargs)
    if not hasattr(module, recipe.factory):
        raise RecordError(f"{module.__file__} has no {recipe.factory}, which the recipe names")
    return getattr(module, recipe.factory)(**recipe.kwargs)


def described(value) -> object:
    """Write an argument that JSON has no form for."""
    return vars(value) if isinstance(value, types.SimpleNamespace) else getattr(value, "__name__", repr(value))


def compare(meta: dict, arrays: dict[str, np.ndarray], stored: Record) -> dict[str, float]:
    """Return the relative error of every stored array; raises RecordError where the run is another model's."""
    count = sum(math.prod(shape) for _, shape, kind in stored.meta["state"] if kind == "param")
    own = sum(math.prod(shape) for _, shape, kind in meta["state"] if kind == "param")
    if own != count:
        raise RecordError(f"the authors' code at {meta['commit']} has {own:,} parameters, the record {count:,}")
    if other := sorted({str(tuple(r)) for r in meta["state"]} ^ {str(tuple(r)) for r in stored.meta["state"]}):
        raise RecordError(f"{len(other)} rows of the state_dict are in one only of run and record: {other[0]}, …")
    if missing := [key for key in stored.arrays if key not in arrays]:
        raise RecordError(f"the recipe gives {', '.join(arrays)}, but not the record's {', '.join(missing)}")
    errors = {}
    for key, value in stored.arrays.items():
        if value.size > LARGEST:
            value = sample(torch.from_numpy(value))
        if value.shape != arrays[key].shape:
            raise RecordError(f"{key} has shape {arrays[key].shape}, in the record {value.shape}")
        errors[key] = 0.0 if np.array_equal(arrays[key], value) else relative_error(arrays[key], value)  # may be zeros
    return errors


def largest_error(key: str, stored: Record) -> float:
    """Return the relative error up to which an array is the stored one: that of its precision."""
    return AGREES if stored.arrays[key].dtype == np.float64 else stored.tolerance(rounded=True)


def forms(arrays: dict[str, np.ndarray]) -> dict:
    """Return what a record holds, but for the numbers."""
    return {key: (value.shape, value.dtype) for key, value in arrays.items()}


def record(family: str, name: str, recipe: Recipe, folders: list[Path], records: Path, check: bool) -> str:
    """Make or check one record; returns the line to print."""
    meta, arrays = make(recipe, find_clone(recipe.source, folders))
    path = records / family / name
    stored = Record(str(path)) if path.with_suffix(".json").exists() else None
    if check and stored is None:
        raise RecordError(f"no record {path.with_suffix('.json')} to check: run without --check to make it")
    line = f"{meta['num_params']:,} parameters"
    if stored is not None:
        errors = compare(meta, arrays, stored)
        line += "; relative errors: " + ", ".join(f"{key} {error:.1e}" for key, error in errors.items())
        if wrong := [key for key, error in errors.items() if not error <= largest_error(key, stored)]:
            raise RecordError(f"not the record's numbers: {', '.join(wrong)}. {line}")
    if not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {} if stored is None else stored.meta
        if "stress" in meta:
            meta["stress"] = kept.get("stress", {}) | meta["stress"]
        text = json.dumps({"family": family, "name": name, **kept, **meta})
        path.with_suffix(".json").write_text(text + "\n")
        if stored is None or forms(stored.arrays) != forms(arrays):
            np.savez_compressed(path.with_suffix(".npz"), **arrays)
    return line


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", metavar="FAMILY", help=f"one of {', '.join(FAMILIES)}")
    parser.add_argument("--authors", metavar="CLONE", nargs="+", type=Path, required=True, help="clones of their code")
    parser.add_argument("--only", metavar="RECORD", nargs="+", help="these records of the family (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the stored records, write nothing")
    parser.add_argument("--records", metavar="FOLDER", type=Path, default=RECORDS, help="default: tests/records")
    args = parser.parse_args(arguments)
    if args.family not in FAMILIES:
        close = difflib.get_close_matches(args.family, FAMILIES, 1)
        parser.error(f"no recipes for {args.family}" + (f"; did you mean {close[0]}?" if close else f": {FAMILIES}"))
    table = recipes(args.family)
    if unknown := sorted(set(args.only or ()) - set(table)):
        parser.error(f"{args.family} has no recipe {', '.join(unknown)}; it has {', '.join(table)}")
    failed = 0
    for name in args.only or table:
        if args.check and not (args.records / args.family / f"{name}.json").exists() and not args.only:
            continue
        try:
            line = record(args.family, name, table[name], [p.resolve() for p in args.authors], args.records, args.check)
            print(f"{args.family}/{name}: {line}", flush=True)
        except RecordError as error:
            print(f"{args.family}/{name}: {error}", file=sys.stderr, flush=True)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
