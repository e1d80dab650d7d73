"""mmengine's checkpoints without running code from them.

mmengine stores its logs beside the weights as objects of its own, which torch's safe reader refuses; it then reads the
whole file unsafely. Here the few things that these objects consist of are allowed, and nothing else is read;
`_compat.install` replaces mmengine's own by `read` and `download`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from torch import nn

from visionzoo.engine.errors import UserError
from visionzoo.models._checkpoint import read_checkpoint
from visionzoo.openmmlab.meta import checkpoint_classes, compare_classes, compare_model
from visionzoo.text import count_of, some


def read(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """Return the content of a checkpoint, tensors on the CPU: a path, or a file that is open.

    Args:
        file: what to read; a path may be of safetensors.
        map_location: as of `torch.load`, for open files.
        weights_only: ignored; nothing but weights and mmengine's logs is read.

    Raises:
        UserError: the file holds something else, or is damaged.
    """
    with torch.serialization.safe_globals(_allowed()):
        try:
            if hasattr(file, "read"):
                return _as_mmengine(torch.load(file, map_location=map_location, weights_only=True))
            return _as_mmengine(read_checkpoint(file))
        except pickle.UnpicklingError as error:
            raise UserError(_refused("the checkpoint", error)) from error
        except ValueError as error:
            raise UserError(str(error)) from error


def check_fit(model: nn.Module, path: str, cfg: Config, classes: Sequence[str] | None) -> list[str]:
    """Compare a checkpoint with a detector or segmentor; mmengine would leave random what does not fit.

    Args:
        model: of the config.
        path: of the checkpoint.
        cfg: compared with the one that the checkpoint holds.
        classes: of the config's data; None where the checkpoint's are taken.

    Returns:
        What is worth saying.

    Raises:
        UserError: weights are missing or have other shapes, or classes are in another order; with the names.
    """
    content = read_any(path)
    missing, other, _ = compare_weights(model, content)
    if missing or other:
        names = checkpoint_classes(content)
        raise UserError(
            f"{path} does not fit the config: {count_of(len(missing), 'weight is', 'weights are')} missing and "
            f"{len(other)} of another shape, such as {some([*other, *missing], 3)}. Use the config that the "
            "training wrote beside it" + (f"; its classes are {some(names, 100)}" if names else "")
        )
    return compare_classes(content, classes, path) + compare_model(content, cfg, path)


def check_start(model: nn.Module, path: str, classes: Sequence[str] | None) -> list[str]:
    """Say what a training takes from the checkpoint that it begins with (load_from): weights that fit, by name.

    Raises:
        UserError: nothing fits, so that training would begin with random weights.
    """
    content = read_any(path)
    missing, other, fitting = compare_weights(model, content)
    if not fitting:
        raise UserError(
            f"load_from={path}: none of its weights fits the model, such as {some([*missing, *other], 3)}; for "
            f"only the weights of a backbone set model.backbone.init_cfg.type=Pretrained and "
            f"model.backbone.init_cfg.checkpoint={path}"
        )
    left = [*other, *missing]
    fit = count_of(len(fitting), "weight fits", "weights fit")
    notes = [f"load_from={path}: {fit}, {len(left)} stay random: {some(left, 3)}"] if left else []
    heads_fit = checkpoint_classes(content) if not other else []
    return notes + (compare_classes(content, classes, path, learning=True) if heads_fit else [])


def compare_weights(model: nn.Module, content: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Return which weights of a model a checkpoint lacks, which have another shape there, and which fit."""
    state = content.get("state_dict", content)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    bare: Any = model.module if is_model_wrapper(model) else model
    for name, part in bare.named_modules():
        if hasattr(part, "take_names"):  # what it does to names when it is loaded
            part.take_names(state, f"{name}." if name else "")
    expected = bare.state_dict()
    missing = [name for name in expected if name not in state]
    there = [name for name in expected if name in state]
    fitting = [name for name in there if getattr(state[name], "shape", None) == expected[name].shape]
    other = [
        f"{name} {tuple(getattr(state[name], 'shape', ()))} in place of {tuple(expected[name].shape)}"
        for name in there
        if name not in set(fitting)
    ]
    return missing, other, fitting


def read_any(path: str) -> dict[str, Any]:
    """Return the content of a checkpoint, of a path or an address.

    Raises:
        UserError: it cannot be read, or is not a dictionary.
    """
    content = download(path, map_location="cpu") if path.startswith(("http://", "https://")) else read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: expected a dictionary of weights, got {type(content).__name__}")
    return content


def download(
    url: str, model_dir: str | None = None, map_location: Any = None, progress: bool = True, **more: Any
) -> Any:
    """Return the content of a checkpoint on the web, downloaded once; as `torch.hub.load_state_dict_from_url`.

    Raises:
        UserError: the file holds something that is neither weights nor mmengine's logs.
    """
    with torch.serialization.safe_globals(_allowed()):
        try:
            content = torch.hub.load_state_dict_from_url(
                url, model_dir, map_location, progress, weights_only=True, **more
            )
            return _as_mmengine(content)
        except pickle.UnpicklingError as error:
            raise UserError(_refused(url, error)) from error


def _as_mmengine(content: Any) -> Any:
    """Name the weights as mmengine does, which DETR and its descendants keep as `model`."""
    if isinstance(content, dict) and "state_dict" not in content and isinstance(content.get("model"), Mapping):
        return {**content, "state_dict": content["model"]}
    return content


def _refused(what: str, error: Exception) -> str:
    return f"{what} is refused: it holds more than weights, and reading that would run code from it ({error})"


def _statistic(owner: Any, name: str) -> Any:
    """Stand for `getattr` in mmengine's logs, where it is called only for these four."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"Unsupported global: getattr of {owner!r}, {name!r}")
    return getattr(owner, name)


def _allowed() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    reconstruct: Any = np.zeros(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # before numpy 2 and since
    of_numpy = [(f, f"{module}.{f.__name__}") for f in (reconstruct, scalar) for module in modules]
    kinds = {type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "uint8", "uint32", "float32", "float64")}
    stand_ins = [(_statistic, name) for name in ("builtins.getattr", "__builtin__.getattr")]
    return [HistoryBuffer, np.ndarray, np.dtype, slice, *kinds, *of_numpy, *stand_ins]
