"""What parts of networks check: what they are built of, and what they are called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from visionzoo.layers.arguments import check_arguments
from visionzoo.text import count_of

_NEVER_EMPTY = ("H", "W")  # axes; batches and tokens may be none
_PERMUTED: Mapping[tuple[str, ...], tuple[int, ...]] = {
    ("B", "H", "W", "C"): (0, 2, 3, 1),
    ("B", "C", "H", "W"): (0, 3, 1, 2),
}  # from the other of the two


class Part(nn.Module):
    """Base of layers that stand in networks by themselves; `forward` begins with `check_inputs`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let the class have its constructor's signature, where Python 3.10 would show that of `__new__`."""
        super().__init_subclass__(**kwargs)
        own = signature(cls.__init__)
        cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the arguments before anything is built of them.

        Raises:
            TypeError: if the class has no argument of a name.
            ValueError: if one is of another type than the constructor states, or out of its range.
        """
        parameters = signature(cls).parameters
        names = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        passed_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # what others check
        given = {name: value for name, value in kwargs.items() if name in parameters or not passed_on}
        check_arguments(cls, dict(zip(names, args, strict=False)) | given)
        return super().__new__(cls)

    def check_inputs(self, axes: str, *inputs: Tensor, any_dtype: bool = False, **sizes: int | None) -> None:
        """Check that inputs have the axes that a part takes, and are floating point in the dtype of its weights.

        Under torch.compile and torch.export nothing is checked, nor what torch.fx traces.

        Args:
            axes: of each input, as "B H W C" or "B 1 C, B N C"; what has one letter has one size, and "..." stands for
                any axes.
            inputs: tensors.
            any_dtype: whether they may be floating point of another dtype than the weights.
            sizes: of axes; None for any.

        Raises:
            ValueError: if they are not such.
        """
        if torch.compiler.is_compiling():
            return
        found: dict[str, int | None] = dict(sizes)
        for names, x in zip(_parsed(axes), inputs, strict=True):
            if not isinstance(x, Tensor):
                continue
            shape = tuple(x.shape)
            if not _fits(shape, names, found):
                raise ValueError(
                    f"{type(self).__name__}: expected {_text(axes, sizes)}, got "
                    f"{' and '.join(str(tuple(each.shape)) for each in inputs)}{_remedy(shape, names, sizes)}"
                )
            check_dtype(self, x, any_dtype=any_dtype)

    def check_maps(self, maps: Sequence[Tensor], channels: Sequence[int]) -> None:
        """Check that maps are [B, C, H, W] each, with these channels in turn.

        Raises:
            ValueError: if they are others.
        """
        if len(maps) != len(channels):
            raise ValueError(
                f"{type(self).__name__}: expected {count_of(len(channels), 'map')}, finest first, of "
                f"{', '.join(map(str, channels))} channels, got {len(maps)}; build it for the maps that there are"
            )
        for x, dim in zip(maps, channels, strict=True):
            self.check_inputs("B C H W", x, C=dim)


def check_dtype(part: nn.Module, x: Tensor, *, any_dtype: bool = False, what: str = "floating point") -> None:
    """Check that x is floating point, in the dtype of the weights; under autocast dtypes may differ.

    Args:
        part: which has the weights.
        x: what it is called with.
        any_dtype: whether any floating point dtype will do.
        what: is expected, for messages.

    Raises:
        ValueError: if it is not.
    """
    weight = None if any_dtype else next(part.parameters(), None)
    if weight is not None and weight.dtype == x.dtype:  # nearly always, and cheap
        return
    dtypes = set() if any_dtype else {p.dtype for p in part.parameters() if p.is_floating_point()}
    dtypes = dtypes or {x.dtype}
    if not x.is_floating_point() or (x.dtype not in dtypes and not _autocast_is_on(x.device)):
        of_weights = "" if any_dtype else f" in the dtype of the weights ({', '.join(sorted(map(str, dtypes)))})"
        raise ValueError(
            f"{type(part).__name__}: expected {what}{of_weights}, got {x.dtype}; convert one, or run under "
            f"torch.autocast"
        )


def _autocast_is_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


@cache
def _parsed(axes: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(each.split()) for each in axes.split(","))


def _fits(shape: Sequence[int], names: Sequence[str], found: dict[str, int | None]) -> bool:
    """Whether a shape has these axes; sizes that are not known yet become so."""
    if names[0] == "...":
        names = names[1:]
        shape = shape[max(0, len(shape) - len(names)) :]
    if len(shape) != len(names):
        return False
    for name, size in zip(names, shape, strict=True):
        expected = int(name) if name.isdigit() else found.get(name)
        if expected is None:
            if size == 0 and name in _NEVER_EMPTY:
                return False
            found[name] = size
        elif expected != size:
            return False
    return True


def _text(axes: str, sizes: Mapping[str, int | None]) -> str:
    known = [f"{name} = {size}" for name, size in sizes.items() if size is not None]
    shapes = " and ".join(f"[{', '.join(names)}]" for names in _parsed(axes))
    return f"{shapes} with {', '.join(known)}" if known else shapes


def _remedy(shape: Sequence[int], names: tuple[str, ...], sizes: Mapping[str, int | None]) -> str:
    """Return what to do about a shape that has not these axes, as the end of a message."""
    if names[0] == "B" and len(shape) == len(names) - 1:
        return "; a batch of one is x[None]"
    if (axes := _PERMUTED.get(names)) and len(shape) == 4 and shape[axes[names.index("C")]] == sizes.get("C"):
        return f"; of the other order it takes x.permute{axes}"
    for name, size in zip(names, shape, strict=False):
        if len(shape) == len(names) and sizes.get(name) not in (None, size):
            return f"; build it for {name} = {size}, or bring the input to {sizes[name]}"
    return ""
