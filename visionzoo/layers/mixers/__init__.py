"""Token mixers, and how a family's stages get theirs.

Every mixer is called as `XMixer(dim, num_heads, **options)` and maps [B, H, W, C] to [B, H, W, C] for any H and W,
so any family that is built from them takes another family's: `mixers=("pool", "pool", "routed", "routed")`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.mixers.channel import ChannelMixer
from visionzoo.layers.mixers.full import FullMixer
from visionzoo.layers.mixers.halo import HaloMixer
from visionzoo.layers.mixers.levit import LevitMixer
from visionzoo.layers.mixers.pool import PoolMixer
from visionzoo.layers.mixers.routed import RoutedMixer
from visionzoo.layers.mixers.single_head import SingleHeadMixer
from visionzoo.layers.mixers.window import WindowMixer

__all__ = [
    "MIXERS",
    "ChannelMixer",
    "FullMixer",
    "HaloMixer",
    "LevitMixer",
    "Mixer",
    "PoolMixer",
    "RoutedMixer",
    "SingleHeadMixer",
    "WindowMixer",
    "build_mixer",
    "resolve_mixers",
]

MIXERS: dict[str, type[Mixer]] = {
    "channel": ChannelMixer,
    "full": FullMixer,
    "levit": LevitMixer,
    "halo": HaloMixer,
    "pool": PoolMixer,
    "routed": RoutedMixer,
    "single_head": SingleHeadMixer,
    "window": WindowMixer,
}

MixerSpec = str | Mapping[str, Any]  # a name of MIXERS or "none", or dict(type=name, **options)


def build_mixer(spec: MixerSpec, dim: int, num_heads: int | None = None) -> Mixer | None:
    """Build the mixer that `spec` names: a name of `MIXERS` or `dict(type=name, **options)`.

    "none" gives None: blocks without token mixing. `num_heads` holds where the options do not give one.

    Raises:
        ValueError: if the name is unknown, or an option is not one of the mixer's.
    """
    options = {"num_heads": num_heads, **_as_options(spec)}
    name = options.pop("type")
    if name == "none":
        return None
    try:
        return MIXERS[name](dim, **options)
    except TypeError as error:
        raise ValueError(f"mixer {name!r} does not take these options: {options} ({error})") from error


def resolve_mixers(
    defaults: Sequence[Sequence[Mapping[str, Any]]], override: MixerSpec | Sequence[Any] | None
) -> list[list[dict[str, Any]]]:
    """Say which mixers each stage has: the family's, or the caller's in their place.

    Args:
        defaults: for each stage the specs that its blocks take in turn.
        override: None for the family's own; one spec for all stages; or a sequence with an entry a stage, each None
            (the family's own), a spec, or a sequence of specs that the stage's blocks take in turn. A mixer that the
            family has in that stage anyway keeps the family's options where the override gives none.

    Raises:
        ValueError: if the number of entries is not that of the stages, or a name is unknown.
    """
    if override is None or isinstance(override, str | Mapping):
        override = [override] * len(defaults)
    if len(override) != len(defaults):
        raise ValueError(
            f"mixers: expected one entry for each of the {len(defaults)} stages, got {len(override)}: {override!r}"
        )
    stages = []
    for own, given in zip(defaults, override, strict=True):
        if given is None:
            stages.append([dict(spec) for spec in own])
            continue
        specs: list[MixerSpec] = [given] if isinstance(given, str | Mapping) else list(given)
        if not specs:
            raise ValueError(f"mixers: a stage needs at least one mixer, got {given!r}")
        options = {spec["type"]: spec for spec in own}
        stages.append([{**options.get(s["type"], {}), **s} for s in map(_as_options, specs)])
    return stages


def _as_options(spec: MixerSpec) -> dict[str, Any]:
    options: dict[str, Any] = {"type": spec} if isinstance(spec, str) else dict(spec)
    name = options.get("type")
    if name not in MIXERS and name != "none":
        close = get_close_matches(str(name), MIXERS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"unknown mixer {name!r}{hint}; expected a name of {sorted(MIXERS)}, or dict(type=name, **options)"
        )
    return options
