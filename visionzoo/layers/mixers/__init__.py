"""Token mixers, and how a family's stages get theirs.

Every mixer is called as `XMixer(dim, num_heads, **options)` and maps [B, H, W, C] to [B, H, W, C] for any H and W,
so any family that is built from them takes another family's: `mixers=("pool", "pool", "routed", "routed")`.
`MixerNCHW(mixer)` is the same layer on [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from visionzoo.layers.mixers.adaptive_fourier import AdaptiveFourierMixer
from visionzoo.layers.mixers.aggregated import AggregatedMixer
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.mixers.channel import ChannelMixer
from visionzoo.layers.mixers.clamped_linear import ClampedLinearMixer
from visionzoo.layers.mixers.cross_window import CrossWindowMixer
from visionzoo.layers.mixers.data_dependent_conv import DataDependentConvMixer
from visionzoo.layers.mixers.decoupled_fc import DecoupledFcMixer
from visionzoo.layers.mixers.dual_attention import DualAttentionMixer
from visionzoo.layers.mixers.dynamic_local import DynamicLocalMixer
from visionzoo.layers.mixers.embedding_free import EmbeddingFreeMixer
from visionzoo.layers.mixers.factorized import FactorizedMixer
from visionzoo.layers.mixers.flow import FlowMixer
from visionzoo.layers.mixers.focused_linear import FocusedLinearMixer
from visionzoo.layers.mixers.forward_cross import ForwardCrossMixer
from visionzoo.layers.mixers.fourier import FourierMixer
from visionzoo.layers.mixers.full import FullMixer
from visionzoo.layers.mixers.gated_positional import GatedPositionalMixer
from visionzoo.layers.mixers.glu import GluMixer
from visionzoo.layers.mixers.gmm import GmmMixer
from visionzoo.layers.mixers.halo import HaloMixer
from visionzoo.layers.mixers.hashed_linear import HashedLinearMixer
from visionzoo.layers.mixers.hilo import HiLoMixer
from visionzoo.layers.mixers.injective_linear import InjectiveLinearMixer
from visionzoo.layers.mixers.kolmogorov_arnold import KolmogorovArnoldMixer
from visionzoo.layers.mixers.large_kernel_ffn import LargeKernelFfnMixer
from visionzoo.layers.mixers.levit import LevitMixer
from visionzoo.layers.mixers.light_conv import LightConvMixer
from visionzoo.layers.mixers.linear import LinearMixer
from visionzoo.layers.mixers.mixture_of_heads import MixtureOfHeadsMixer
from visionzoo.layers.mixers.moving_average import MovingAverageMixer
from visionzoo.layers.mixers.multi_pool import MultiPoolMixer
from visionzoo.layers.mixers.nchw import MixerNCHW
from visionzoo.layers.mixers.neighborhood import NeighborhoodMixer
from visionzoo.layers.mixers.nystrom import NystromMixer
from visionzoo.layers.mixers.pattern import PatternMixer
from visionzoo.layers.mixers.pool import PoolMixer
from visionzoo.layers.mixers.routed import RoutedMixer
from visionzoo.layers.mixers.score import ScoreMixer
from visionzoo.layers.mixers.sea import SeaMixer
from visionzoo.layers.mixers.single_head import SingleHeadMixer
from visionzoo.layers.mixers.sparsifiner import SparsifinerMixer
from visionzoo.layers.mixers.spatial_reduction import SpatialReductionMixer
from visionzoo.layers.mixers.spectral_gate import SpectralGateMixer
from visionzoo.layers.mixers.subspace import SubspaceMixer
from visionzoo.layers.mixers.super_token import SuperTokenMixer
from visionzoo.layers.mixers.taylor_shift import TaylorShiftMixer
from visionzoo.layers.mixers.token_choice import ExpertChoiceMixer, KMeansMixer
from visionzoo.layers.mixers.window import WindowMixer
from visionzoo.layers.specs import Spec, build_spec, by_part, in_turn, read_spec

__all__ = [
    "MIXERS",
    "AdaptiveFourierMixer",
    "AggregatedMixer",
    "ChannelMixer",
    "ClampedLinearMixer",
    "CrossWindowMixer",
    "DataDependentConvMixer",
    "DecoupledFcMixer",
    "DualAttentionMixer",
    "DynamicLocalMixer",
    "EmbeddingFreeMixer",
    "ExpertChoiceMixer",
    "FactorizedMixer",
    "FlowMixer",
    "FocusedLinearMixer",
    "ForwardCrossMixer",
    "FourierMixer",
    "FullMixer",
    "GatedPositionalMixer",
    "GluMixer",
    "GmmMixer",
    "HaloMixer",
    "HashedLinearMixer",
    "HiLoMixer",
    "InjectiveLinearMixer",
    "KMeansMixer",
    "KolmogorovArnoldMixer",
    "LargeKernelFfnMixer",
    "LevitMixer",
    "LightConvMixer",
    "LinearMixer",
    "Mixer",
    "MixerNCHW",
    "MixtureOfHeadsMixer",
    "MovingAverageMixer",
    "MultiPoolMixer",
    "NeighborhoodMixer",
    "NystromMixer",
    "PatternMixer",
    "PoolMixer",
    "RoutedMixer",
    "ScoreMixer",
    "SeaMixer",
    "SingleHeadMixer",
    "SparsifinerMixer",
    "SpatialReductionMixer",
    "SpectralGateMixer",
    "SubspaceMixer",
    "SuperTokenMixer",
    "TaylorShiftMixer",
    "WindowMixer",
    "build_mixer",
    "combine_mixers",
    "resolve_mixers",
]

MIXERS: dict[str, type[Mixer]] = {
    "aggregated": AggregatedMixer,
    "adaptive_fourier": AdaptiveFourierMixer,
    "channel": ChannelMixer,
    "clamped_linear": ClampedLinearMixer,
    "cross_window": CrossWindowMixer,
    "data_dependent_conv": DataDependentConvMixer,
    "decoupled_fc": DecoupledFcMixer,
    "dual_attention": DualAttentionMixer,
    "dynamic_local": DynamicLocalMixer,
    "embedding_free": EmbeddingFreeMixer,
    "expert_choice": ExpertChoiceMixer,
    "factorized": FactorizedMixer,
    "flow": FlowMixer,
    "focused_linear": FocusedLinearMixer,
    "forward_cross": ForwardCrossMixer,
    "fourier": FourierMixer,
    "full": FullMixer,
    "gated_positional": GatedPositionalMixer,
    "glu": GluMixer,
    "gmm": GmmMixer,
    "halo": HaloMixer,
    "hashed_linear": HashedLinearMixer,
    "hilo": HiLoMixer,
    "injective_linear": InjectiveLinearMixer,
    "kmeans": KMeansMixer,
    "kolmogorov_arnold": KolmogorovArnoldMixer,
    "large_kernel_ffn": LargeKernelFfnMixer,
    "levit": LevitMixer,
    "light_conv": LightConvMixer,
    "linear": LinearMixer,
    "mixture_of_heads": MixtureOfHeadsMixer,
    "moving_average": MovingAverageMixer,
    "multi_pool": MultiPoolMixer,
    "neighborhood": NeighborhoodMixer,
    "nystrom": NystromMixer,
    "pattern": PatternMixer,
    "pool": PoolMixer,
    "routed": RoutedMixer,
    "score": ScoreMixer,
    "sea": SeaMixer,
    "single_head": SingleHeadMixer,
    "sparsifiner": SparsifinerMixer,
    "spatial_reduction": SpatialReductionMixer,
    "spectral_gate": SpectralGateMixer,
    "subspace": SubspaceMixer,
    "super_token": SuperTokenMixer,
    "taylor_shift": TaylorShiftMixer,
    "window": WindowMixer,
}


def build_mixer(spec: Spec, dim: int, num_heads: int | None = None) -> Mixer | None:
    """Build the mixer that `spec` names: a name of `MIXERS` or `dict(type=name, **options)`.

    "none" gives None: blocks without token mixing. `num_heads` holds where the options do not give one.

    Raises:
        ValueError: if the name is unknown, or an option is not one of the mixer's or not of its type.
    """
    if read_spec("mixer", spec, MIXERS, ("none",))["type"] == "none":
        return None
    mixer: Mixer = build_spec("mixer", spec, MIXERS, dim, num_heads=num_heads)
    return mixer


def resolve_mixers(
    defaults: Sequence[Sequence[Mapping[str, Any]]], override: Spec | Sequence[Any] | None
) -> list[list[dict[str, Any]]]:
    """Say which mixers each stage has: the family's, or the caller's in their place.

    Args:
        defaults: for each stage the specs that its blocks take in turn.
        override: None for the family's own; one spec for all stages; or a sequence with an entry a stage, each None
            (the family's own), a spec, or a sequence of specs that the stage's blocks take in turn. A mixer that the
            family has in that stage anyway keeps the family's options where the override gives none; where the family
            has it several times, with different options in turn, so has the result.

    Raises:
        ValueError: if the number of entries is not that of the stages, or a name is unknown.
    """
    stages = []
    for own, given in zip(defaults, by_part("mixers", override, len(defaults)), strict=True):
        if given is None:
            stages.append([dict(spec) for spec in own])
            continue
        specs = in_turn("mixers", given)
        options: dict[str, list[Mapping[str, Any]]] = {}
        for spec in own:
            options.setdefault(spec["type"], []).append(spec)
        asked = [read_spec("mixer", spec, MIXERS, ("none",)) for spec in specs]
        if len(asked) == 1:
            asked = asked * len(options.get(asked[0]["type"], [None]))
        turns = {name: cycle(turn) for name, turn in options.items()}
        stages.append([{**next(turns.get(spec["type"], cycle([{}]))), **spec} for spec in asked])
    return stages


def combine_mixers(
    own: Sequence[Sequence[Mapping[str, Any]] | None], override: Spec | Sequence[Any] | None
) -> list[Any]:
    """Lay a caller's `mixers` over those of a variant, stage by stage, as `resolve_mixers` does.

    Args:
        own: the variant's, for each stage a sequence of specs or None (the family's own).
        override: the caller's, as in `resolve_mixers`.

    Returns:
        An override for `resolve_mixers`.

    Raises:
        ValueError: if the number of entries is not that of the stages, or a name is unknown.
    """
    stages = by_part("mixers", override, len(own))
    return [
        given if spec is None else resolve_mixers([spec], [given])[0] for spec, given in zip(own, stages, strict=True)
    ]
