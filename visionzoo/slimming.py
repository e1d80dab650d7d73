"""One set of weights at many widths: a model runs with its first heads and hidden channels only, or is cut to them.

Slimmable networks (https://arxiv.org/abs/1812.08928) cut every layer's channels. Here the channels of the maps between
blocks stay, and with them every norm over channels: attention does with fewer heads, MLPs and decoders with fewer
hidden channels. Batch norms over hidden channels see other statistics at every width: `slimmed_call` leaves their
running averages as they are, and those of a model that `slim` has cut are to be measured anew, such as by
`torch.optim.swa_utils.update_bn`.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from timm.layers import Mlp
from torch import Tensor, nn
from torch.func import functional_call

from visionzoo._torch_private import BatchNorm
from visionzoo.decoders.edaformer import EDAFormerDecoder
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.mixers.full import FullMixer
from visionzoo.layers.mixers.spatial_reduction import SpatialReductionMixer
from visionzoo.layers.mixers.window import WindowMixer
from visionzoo.layers.mlp import ConvMlp
from visionzoo.layers.nhwc import DepthwiseConvNHWC
from visionzoo.text import some


class Width(NamedTuple):
    """What the width of a layer is, and which tensors have it.

    Attributes:
        units: heads or hidden channels.
        axes: of a tensor that has them, by its name: the axis, and how many groups of all units follow each other there
            (3 for a projection to q, k and v). Those that a layer was built without are left out.
        counts: attributes of the layer that hold the number of units.
    """

    units: int
    axes: Mapping[str, tuple[int, int]]
    counts: tuple[str, ...] = ()


def _affine(name: str, groups: int = 1) -> dict[str, tuple[int, int]]:
    """Return the axes of a layer whose outputs are the units, batch norms among them."""
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{tensor}": (0, groups) for tensor in names}


def _mlp(mlp: Any) -> Width | None:
    if not isinstance(mlp.norm, nn.Identity):
        return None  # it normalizes over the units
    return Width(mlp.fc1.weight.shape[0], {**_affine("fc1"), "fc2.weight": (1, 1)})


def _conv_mlp(mlp: Any) -> Width:
    axes = {**_affine("fc1", 2 if mlp.gated else 1), **_affine("dwconv"), "fc2.weight": (1, 1)}
    return Width(mlp.fc2.in_features, axes)


def _attention(mixer: Any) -> Width | None:
    if mixer.kv_heads != mixer.num_heads or getattr(mixer, "lepe", None) is not None:
        return None  # heads are shared, or a convolution of all channels is added to them
    groups = {"q": 1, "kv": 2, "qkv": 3}
    axes = {name: axis for layer, count in groups.items() for name, axis in _affine(layer, count).items()}
    position_bias = {"relative_position_bias.table": (1, 1), "relative_position_bias.bias": (0, 1)}
    return Width(mixer.num_heads, {**axes, **position_bias, "proj.weight": (1, 1)}, ("num_heads", "kv_heads"))


def _edaformer(decoder: Any) -> Width:
    axes = {**_affine("fuse.conv"), **_affine("fuse.bn"), "classifier.weight": (1, 1)}
    return Width(decoder.classifier.in_channels, axes)


# By the class itself: one that inherits may have more tensors of that width. A layer of yours can be added.
WIDTHS: dict[type[nn.Module], Callable[[Any], Width | None]] = {
    Mlp: _mlp,
    ConvMlp: _conv_mlp,
    FullMixer: _attention,
    SpatialReductionMixer: _attention,
    WindowMixer: _attention,
    EDAFormerDecoder: _edaformer,
}
_SHAPES: dict[type, tuple[str, ...]] = {  # attributes of torch's layers that repeat the shape of the weight
    nn.Linear: ("out_features", "in_features"),
    nn.Conv2d: ("out_channels", "in_channels"),
    BatchNorm: ("num_features",),
    DepthwiseConvNHWC: ("dim",),
}


def slimmable(model: nn.Module) -> tuple[dict[str, Width], list[str]]:
    """Return the layers of a model that can be slimmed, by name, and the names of mixers and MLPs that cannot."""
    found: dict[str, Width] = {}
    fixed = []
    for name, module in model.named_modules():
        measure = WIDTHS.get(type(module))
        if measure is not None and (width := measure(module)) is not None:
            found[name] = width
        elif isinstance(module, Mixer | Mlp | ConvMlp):
            fixed.append(name)
    return found, fixed


@dataclass(frozen=True)
class Cut:
    """The part of a model that stays: views of its tensors by name, and the units of its layers."""

    tensors: dict[str, Tensor]
    counts: list[tuple[nn.Module, tuple[str, ...], int]]

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Let the layers count only the units that stay, in a `with` block."""
        before = [(layer, name, getattr(layer, name)) for layer, names, _ in self.counts for name in names]
        try:
            for layer, names, units in self.counts:
                for name in names:
                    setattr(layer, name, units)
            yield
        finally:
            for layer, name, value in before:
                setattr(layer, name, value)


def cut(model: nn.Module, shares: Mapping[str, float]) -> Cut:
    """Return what stays of a model where its layers keep their first units.

    Args:
        model: see `slimmable`.
        shares: of the units that stay, above 0 and at most 1, by the beginning of the layers' names; of those that fit
            a layer the longest counts, "" fits all. At least one unit stays; parts of one are rounded up.

    Raises:
        ValueError: if a share is out of range, or no slimmable layer's name begins so.
    """
    layers, _ = slimmable(model)
    for prefix, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"slim: a share is above 0 and at most 1, got {share!r} for {prefix!r}")
        if not any(_begins(name, prefix) for name in layers):
            raise ValueError(
                f"slim: no slimmable layer's name begins with {prefix!r}; there are {some(layers) or 'none'}"
            )
    tensors: dict[str, Tensor] = {}
    counts: list[tuple[nn.Module, tuple[str, ...], int]] = []
    there = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, width in layers.items():
        fitting = [prefix for prefix in shares if _begins(name, prefix)]
        if not fitting:
            continue
        kept = max(1, math.ceil(round(shares[max(fitting, key=len)] * width.units, 6)))
        if kept == width.units:
            continue
        for tensor, (axis, groups) in width.axes.items():
            path = f"{name}.{tensor}" if name else tensor
            if path in there:
                tensors[path] = _first_units(there[path], axis, groups, width.units, kept)
        counts.append((model.get_submodule(name), width.counts, kept))
    return Cut(tensors, counts)


def slimmed_call(model: nn.Module, shares: Mapping[str, float], *args: Any) -> Any:
    """Call a model at a width; gradients reach the weights that take part.

    Batch norms in training mode normalize by the batch and leave the model's running averages as they are.

    Args:
        model: see `slimmable`; at the full width it is called as it is, but for these averages.
        shares: see `cut`.
        args: of the model.

    Raises:
        ValueError: as `cut`.

    >>> import torch
    >>> mlp = Mlp(4, 8)
    >>> torch.equal(slimmed_call(mlp, {"": 0.5}, torch.ones(1, 4)), slim(mlp, {"": 0.5})(torch.ones(1, 4)))
    True
    """
    part = cut(model, shares)
    averages = {name: buffer for name, buffer in model.named_buffers() if model.training}
    averages |= {name: tensor for name, tensor in part.tensors.items() if name in averages}
    with part.counted():
        return functional_call(
            model, {**part.tensors, **{name: buffer.clone() for name, buffer in averages.items()}}, args
        )


def slim(model: nn.Module, shares: Mapping[str, float]) -> nn.Module:
    """Return a smaller model: a copy with only the units that stay, such as to export.

    Args:
        model: see `slimmable`; it is not changed.
        shares: see `cut`.

    Raises:
        ValueError: as `cut`.

    >>> slim(Mlp(4, 8), {"": 0.5}).fc1
    Linear(in_features=4, out_features=4, bias=True)
    """
    model = copy.deepcopy(model)
    part = cut(model, shares)
    for name, tensor in part.tensors.items():
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        kept = tensor.detach().clone()
        if last in owner._parameters:
            setattr(owner, last, nn.Parameter(kept, requires_grad=owner.get_parameter(last).requires_grad))
        else:
            setattr(owner, last, kept)
        for kind, names in _SHAPES.items():
            if isinstance(owner, kind) and last == "weight":
                for attribute, size in zip(names, kept.shape, strict=False):
                    setattr(owner, attribute, size)
    for layer, names, units in part.counts:
        for attribute in names:
            setattr(layer, attribute, units)
    return model


def _begins(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _first_units(tensor: Tensor, axis: int, groups: int, units: int, kept: int) -> Tensor:
    """Return the first units of each group along an axis of a tensor."""
    size = tensor.shape[axis] // (groups * units)
    if groups == 1:
        return tensor.narrow(axis, 0, kept * size)
    parts = tensor.unflatten(axis, (groups, units * size))
    return parts.narrow(axis + 1, 0, kept * size).flatten(axis, axis + 1)
