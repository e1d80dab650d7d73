"""Folding batch norms into the linear layers and convolutions beside them, and biases of positions, for inference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

from visionzoo.kernels.precision import double
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.text import count_of, some

_logger = logging.getLogger(__name__)

_TRAIN_THE_ORIGINAL = (
    "this model was fused for inference, its batch norms or position biases are folded into other tensors: train the "
    "model that was given to visionzoo.fuse (it was not changed), and fuse that again"
)
_LAYERS = nn.Conv2d | nn.Linear | DepthwiseConvNHWC
_NORMS_OF_MAPS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)  # themselves: others have activations inside


class Folded(nn.Identity):
    """In place of a batch norm whose work the layer beside it does."""


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """Return a copy for inference, in which batch norms are folded into the convolutions and linear layers beside them.

    The outputs are the same up to rounding. The given model is not changed and stays the one to train and to save:
    the copy is in eval mode, none of its parameters requires a gradient, and where something was folded it raises when
    asked to train or to load unfused weights, and its state_dict has other names. Fusing it again gives an equal one.

    Position biases that are looked up in a table are looked up once (modules with a method `precompute`, which keep
    them in a buffer `bias`).

    Branches that are linear then become one convolution (modules with a method `merge_branches`).

    Folded are the pairs of the zoo's layers (modules with a method `fusible`) and neighbors in an `nn.Sequential`. A
    norm that comes before a convolution with zero padding stays: its shift is missing in the padding.

    Args:
        model: any module; DDP, DataParallel and torch.compile around it are taken off. Hooks are copied with their
            modules, but for those of folded norms, which a warning names.

    Raises:
        ValueError: if tensors are computed from others before every forward pass (pruning, weight_norm), or quantized.
    """
    bare: Any = model
    while (compiled := hasattr(bare, "_orig_mod")) or isinstance(
        bare, nn.DataParallel | nn.parallel.DistributedDataParallel
    ):
        bare = bare._orig_mod if compiled else bare.module
    _refuse_computed_weights(bare)
    fused: nn.Module = copy.deepcopy(bare).requires_grad_(False)
    before = dict(fused.named_modules())
    for module in list(fused.modules()):
        for first, second in _pairs(module):
            _fold(module, first, second)
        if callable(precompute := getattr(module, "precompute", None)):
            precompute()
    for module in list(fused.modules()):  # now that branches hold no norms
        if callable(merge_branches := getattr(module, "merge_branches", None)):
            merge_branches()
    fused.eval()
    for module in fused.modules():
        if any(map(_is_folded, module.modules())) and "train" not in vars(module):  # else it was fused before
            _set_in_stone(module)
    after = dict(fused.named_modules())
    hooked = [path for path, module in before.items() if after.get(path) is not module and _has_hooks(module)]
    if hooked:
        _logger.warning("fuse: hooks of %d folded norms are left out: %s", len(hooked), ", ".join(hooked))
    return fused


def has_quantized_layers(model: nn.Module) -> bool:
    """Whether layers of a model quantize their weights (`visionzoo.quantization`)."""
    return any(hasattr(module, "quantize_weight") for module in model.modules())


def _refuse_computed_weights(model: nn.Module) -> None:
    """Refuse modules whose tensors are computed from others before every forward: what is folded would be undone."""
    if has_quantized_layers(model):
        raise ValueError(
            "fuse: the model is quantized, and norms have no place in its levels; export it instead (visionzoo export, "
            "or visionzoo.deploy.integers.to_integers)"
        )
    computed = []
    for path, module in model.named_modules():
        own = module._parameters
        names = [name for name in vars(module) if f"{name}_orig" in own or f"{name}_g" in own]  # pruned, normalized
        names += module.parametrizations if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
        computed += [f"{path}.{name}" if path else name for name in names]
    if computed:
        raise ValueError(
            f"fuse: {count_of(len(computed), 'tensor is', 'tensors are')} computed from others in every "
            "forward pass (pruning, weight_norm, "
            f"spectral_norm, parametrizations): {some(computed, 4)}. Make "
            f"them permanent first, by torch.nn.utils.prune.remove, remove_weight_norm, remove_spectral_norm or "
            f"parametrize.remove_parametrizations"
        )


def _has_hooks(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if name.endswith("_hooks"))


def unfused_part(fused: nn.Module, state_dict: Iterable[str], prefix: str = "") -> str | None:
    """Return the name of a folded part for which `state_dict` has the tensors of an unfused model, None without any.

    Args:
        fused: what `fuse` returned, or a part of it; in any other module nothing is folded.
        state_dict: names of tensors.
        prefix: what stands before the names of this module in `state_dict`.
    """
    names = list(state_dict)
    for path, part in fused.named_modules():
        start = f"{prefix}{path}." if path else prefix
        given = {name[len(start) :] for name in names if name.startswith(start)} if _is_folded(part) else ()
        if given and (isinstance(part, Folded) or "bias" not in given):
            return start.removesuffix(".")
    return None


def _is_folded(module: nn.Module) -> bool:
    """Whether something was folded in this very module."""
    return isinstance(module, Folded) or (hasattr(module, "precompute") and module.bias is not None)


def _set_in_stone(module: Any) -> None:
    """Let a module refuse training and unfused weights itself: when a part of it could, others would be changed."""
    module.train = partial(_stay_in_eval_mode, module)
    module.register_load_state_dict_pre_hook(_refuse_unfused_weights)


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise RuntimeError(_TRAIN_THE_ORIGINAL)
    return type(module).train(module, False)


def _refuse_unfused_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if part := unfused_part(module, state_dict, prefix):
        raise RuntimeError(
            f"this model was fused for inference ({part} is folded), but the weights are those of an unfused model: "
            f"load them into an unfused model and fuse that"
        )


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of children that follow each other directly."""
    if callable(fusible := getattr(module, "fusible", None)):
        return fusible()
    if type(module) is nn.Sequential:
        return [
            (first, second)
            for (first, a), (second, b) in pairwise(module.named_children())
            if any(isinstance(x, nn.Conv2d) and type(y) in _NORMS_OF_MAPS for x, y in ((a, b), (b, a)))
        ]
    return []


def _fold(parent: nn.Module, first: str, second: str) -> None:
    """Fold one of two children of `parent` into the other where that is a batch norm and can be."""
    before, after = parent.get_submodule(first), parent.get_submodule(second)
    if isinstance(before, _LAYERS) and _has_statistics(after):
        scale, shift = _scale_and_shift(after)
        weight, bias = double(before.weight), double(before.bias)
        _set(before, weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift if bias is None else bias * scale + shift)
        setattr(parent, second, Folded())
    elif _has_statistics(before) and isinstance(after, _LAYERS) and _without_padding(after):
        scale, shift = _scale_and_shift(before)
        weight, bias = double(after.weight), double(after.bias)
        groups = len(scale) // weight.shape[1]
        # [in] -> [out, in / groups, 1, 1]: the input channels that each output channel sees
        scale, shift = (
            t.view(groups, -1).repeat_interleave(len(weight) // groups, dim=0).view(*weight.shape[:2], *trailing)
            for t, trailing in [(t, [1] * (weight.ndim - 2)) for t in (scale, shift)]
        )
        constant = (weight * shift).flatten(1).sum(1)
        _set(after, weight * scale, constant if bias is None else bias + constant)
        setattr(parent, first, Folded())


def _has_statistics(norm: nn.Module) -> bool:
    return type(norm) in (nn.BatchNorm1d, *_NORMS_OF_MAPS) and norm.running_mean is not None


def _without_padding(layer: nn.Module) -> bool:
    if isinstance(layer, DepthwiseConvNHWC):
        return layer.kernel_size == 1
    return not isinstance(layer, nn.Conv2d) or layer.padding == "valid" or layer.padding == (0, 0)


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Return what a batch norm does in inference, x·scale + shift, each [C]."""
    mean, variance, weight, bias = map(double, (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    scale = (variance + norm.eps).rsqrt() * (1 if weight is None else weight)
    return scale, (0 if bias is None else bias) - mean * scale


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    dtype: Any = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
