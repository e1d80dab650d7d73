"""What a place of the map attends to in each stage: any mixer by its derivative, and by weights where it has them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionzoo.explanation.attention import outer_mixers
from visionzoo.kernels.scope import use_backend
from visionzoo.layers.attention import record_attention
from visionzoo.layers.mixers.base import Mixer
from visionzoo.models._contract import Contract
from visionzoo.text import some

AT_ONCE = 2**22  # numbers of a mixer's input that are held as copies at once


@dataclass(frozen=True)
class Reach:
    """What one place sees through one mixer.

    Attributes:
        name: of the mixer in the model, such as "stages.2.blocks.3.mixer".
        kind: its class.
        place: row and column of the place in the mixer's output.
        reach: [h, w], the Frobenius norm of the derivative of the mixer's output at the place (all channels) with
            respect to its input at each token of the map. Zero where the token has no influence at all: outside of
            windows, neighborhoods, halos and regions that are not routed to.
        prefix: [P], the same of prefix tokens, where the mixer sees such.
        channels: [C], the same over all tokens, for each channel of the input.
        weights: [G, h, w], what the place gives to each token, where the mixer has a score map; else None.
    """

    name: str
    kind: str
    place: tuple[int, int]
    reach: Tensor
    prefix: Tensor
    channels: Tensor
    weights: Tensor | None


@dataclass
class _Call:
    """What a mixer was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def attended(
    model: nn.Module,
    image: Tensor,
    place: tuple[float, float] = (0.5, 0.5),
    *,
    mixers: Sequence[str] | None = None,
    probes: int = 64,
    seed: int = 0,
) -> list[Reach]:
    """Return what a place of an image attends to in the mixers of a model, from the first to the last.

    The derivative is that of the mixer by itself, its input held fixed: norms before it and the residual connection
    around it do not count. Scores count as well as values: a token may matter by changing where the place looks.

    Args:
        model: a model of the zoo, in evaluation mode.
        image: [1, in_chans, H, W].
        place: shares of the image's height and width, from 0 to 1.
        mixers: names of them; None for the last of each stage, or of each quarter of an isotropic model's blocks, but
            for those whose tokens have no places on the map (behind a reducer, or latents).
        probes: a mixer of at most this many channels is differentiated exactly, by each of them; of more, the norm is
            estimated from as many random signs (Hutchinson), whose expected square is exact.
        seed: of these signs.

    Raises:
        ValueError: if the model has no mixers, or none of a name, the tokens of one that is named or of all have no
            places, or an argument is out of its range.

    >>> import timm, torch, visionzoo
    >>> model = timm.create_model("zoo_deit_t", depth=2, mixers="window", num_classes=10).eval()
    >>> last = attended(model, torch.randn(1, 3, 64, 80), (0.2, 0.9))[-1]
    >>> last.name, last.place, last.reach.shape
    ('blocks.1.mixer', (0, 4), torch.Size([4, 5]))
    """
    if len(image) != 1:
        raise ValueError(f"attended: expected one image, got a batch of {len(image)}; call it for each")
    if not all(0 <= share <= 1 for share in place):
        raise ValueError(f"attended: place is two shares from 0 to 1, of height and width, got {place=}")
    if probes < 1:
        raise ValueError(f"attended: probes must be positive, got {probes=}")
    calls: dict[str, _Call] = {}

    def keep(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[name] = _Call(args, kwargs)

    chosen = _choose(model, mixers)
    hooks = [
        mixer.register_forward_pre_hook(functools.partial(keep, name), with_kwargs=True)
        for name, mixer in chosen.items()
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    sizes = _map_sizes(model, image)
    found: list[Reach] = []
    without: dict[str, list[str]] = {}  # why -> mixers
    for name, mixer in chosen.items():
        read: Any = "run on no such image"
        if name in calls:
            beside = getattr(model, "num_prefix_tokens", 1), getattr(model, "test_registers", 0)
            read = _places(calls[name], sizes, *beside)
        if isinstance(read, str):
            without.setdefault(read, []).append(name)
        else:
            size, count = read
            found.append(_reach(name, mixer, calls[name], size, count, place, probes, seed))
    if without and (mixers is not None or not found):
        reasons = "; ".join(f"{some(names)} {reason}" for reason, names in without.items())
        raise ValueError(f"{type(model).__name__}: {reasons}")
    return found


def last_mixers(model: nn.Module) -> list[str]:
    """Return the names of the last mixer of each stage, or of each quarter of an isotropic model's blocks.

    Raises:
        ValueError: if the model has none.
    """
    parts = [(f"{model.PARTS}.{i}", part) for i, part in enumerate(model.parts)] if isinstance(model, Contract) else []
    found = [names for path, part in parts if (names := [name for name, _ in outer_mixers(part, path)])]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no token mixers of the zoo, of which a place could attend to anything; its "
            "features and the gradients of its predictions can be looked at"
        )
    lasts = []
    for names in found:  # one inside a block that has its own, as TNT's of pixels, sees a part of the image
        outermost = min(name.count(".") for name in names)
        lasts.append([name for name in names if name.count(".") == outermost][-1])
    return lasts if len(lasts) <= 5 else [lasts[len(lasts) * i // 4 - 1] for i in (1, 2, 3, 4)]


def _choose(model: nn.Module, names: Sequence[str] | None) -> dict[str, Mixer]:
    there = dict(outer_mixers(model))
    if names is None:
        names = last_mixers(model)
    if strangers := [name for name in names if name not in there]:
        raise ValueError(
            f"{type(model).__name__} has no mixers {some(strangers)}; it has {some(list(there)) if there else 'none'}"
        )
    return {name: there[name] for name in names}


def _reach(
    name: str,
    mixer: Mixer,
    call: _Call,
    size: tuple[int, int],
    count: int,
    place: tuple[float, float],
    probes: int,
    seed: int,
) -> Reach:
    x, *beside = call.args
    tokens = (x.shape[1], x.shape[2]) != size  # [B, 1, P + N, C]
    kwargs = {key: value for key, value in call.kwargs.items() if key != "score"}
    with use_backend("reference"), torch.no_grad(), record_attention() as weights:
        out = _first(mixer(x, *beside, **kwargs))
    after = (out.shape[1], out.shape[2]) if not tokens else size
    row, column = (min(int(share * side), side - 1) for share, side in zip(place, after, strict=True))
    at = (0, count + row * after[1] + column) if tokens else (row, column)
    squares = _squared_derivative(mixer, x, beside, kwargs, at, out.shape[-1], probes, seed)
    norms = squares.sum(-1).flatten()  # of each token
    seen = None
    whole = x.shape[1] * x.shape[2]
    flat = at[0] * out.shape[2] + at[1]
    if mixer.SCORE_MAP and len(weights) == 1 and weights[0].shape[0] == 1 and weights[0].shape[3] == whole:
        seen = weights[0][0, :, flat, count:].unflatten(-1, size).cpu()
    return Reach(
        name,
        type(mixer).__name__,
        (row, column),
        norms[count:].sqrt().unflatten(0, size).cpu(),
        norms[:count].sqrt().cpu(),
        squares.flatten(0, -2).sum(0).sqrt().cpu(),
        seen,
    )


def _places(
    call: _Call, sizes: Mapping[int, tuple[int, int]], prefix: int, registers: int
) -> tuple[tuple[int, int], int] | str:
    """Return the size of the map that a mixer sees and the number of prefix tokens; in words why there is none."""
    maps, rows, columns = call.args[0].shape[:3]
    if maps > 1:
        return f"run on {maps} maps of an image, each a part of it or another view"
    if rows > 1 or (columns in sizes and sizes[columns][0] == 1):
        return (rows, columns), 0
    for count in (0, prefix, prefix + 1, prefix + registers):  # one more where a memory has its own
        if columns - count in sizes:
            return sizes[columns - count], count
    return f"see {columns} tokens that have no fixed places on a map, as those behind a reducer, and latents, have none"


def _squared_derivative(
    mixer: Mixer,
    x: Tensor,
    beside: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    at: tuple[int, int],
    channels: int,
    probes: int,
    seed: int,
) -> Tensor:
    """Return the squares of the output's derivatives at a place, summed over the output's channels: [H, W, C]."""
    if channels <= probes:
        directions, factor = torch.eye(channels, dtype=torch.float64), 1.0
    else:
        signs = torch.randint(2, (probes, channels), generator=torch.Generator().manual_seed(seed))
        directions, factor = 2.0 * signs.double() - 1, 1 / probes
    total = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    for some_directions in directions.split(max(1, AT_ONCE // x.numel())):
        copies = len(some_directions)
        inputs = x.detach().expand(copies, *x.shape[1:]).clone().requires_grad_()
        others = [_copies(each, copies) for each in beside]
        with torch.enable_grad():
            out = _first(mixer(inputs, *others, **{key: _copies(value, copies) for key, value in kwargs.items()}))
            value = (out[:, at[0], at[1]] * some_directions.to(out)).sum()
        (gradient,) = torch.autograd.grad(value, inputs)
        total += gradient.double().square().sum(0)
    return total * factor


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _copies(value: Any, copies: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1:
        return value.detach().expand(copies, *value.shape[1:])
    return value


@torch.no_grad()
def _map_sizes(model: Any, image: Tensor) -> dict[int, tuple[int, int]]:
    """Return height and width of the model's maps, by the number of their places."""
    features = model.forward_intermediates(image, intermediates_only=True)
    return {each.shape[2] * each.shape[3]: (each.shape[2], each.shape[3]) for each in features}
