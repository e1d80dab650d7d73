"""Gates: plug-in modules that reweigh a map, for any backbone.

Every gate is called as `XGate(dim, **options)` and maps [B, H, W, C] to [B, H, W, C] for any H and W. In a model of the
zoo they stand at the end of blocks' residual branches: `timm.create_model("zoo_davit_t", gates=("eca", None, "cbam",
{"type": "psa", "variant": "s"}))`, see `visionzoo.models._gating`. `GateNCHW(gate)` is the same layer on [B, C, H, W].
"""

from __future__ import annotations

from visionzoo.layers.gates.a2n import A2nGate, PixelGate
from visionzoo.layers.gates.base import Gate
from visionzoo.layers.gates.cbam import CbamGate
from visionzoo.layers.gates.efficient_attention import EfficientAttentionGate
from visionzoo.layers.gates.ela import ElaGate
from visionzoo.layers.gates.from_timm import (
    CircularEcaGate,
    CoordinateGate,
    EcaGate,
    EffectiveSqueezeExciteGate,
    GatherExciteGate,
    GlobalContextGate,
    SimpleCoordinateGate,
    SqueezeExciteGate,
    StripGate,
)
from visionzoo.layers.gates.magc import MagcGate
from visionzoo.layers.gates.nchw import GateNCHW
from visionzoo.layers.gates.psa import PsaGate
from visionzoo.layers.gates.triplet import TripletGate
from visionzoo.layers.gates.ulsam import UlsamGate
from visionzoo.layers.specs import Spec, build_spec

__all__ = [
    "GATES",
    "A2nGate",
    "CbamGate",
    "CircularEcaGate",
    "CoordinateGate",
    "EcaGate",
    "EffectiveSqueezeExciteGate",
    "EfficientAttentionGate",
    "ElaGate",
    "Gate",
    "GateNCHW",
    "GatherExciteGate",
    "GlobalContextGate",
    "MagcGate",
    "PixelGate",
    "PsaGate",
    "SimpleCoordinateGate",
    "SqueezeExciteGate",
    "StripGate",
    "TripletGate",
    "UlsamGate",
    "build_gate",
]

GATES: dict[str, type[Gate]] = {
    "a2n": A2nGate,
    "cbam": CbamGate,
    "ceca": CircularEcaGate,
    "coord": CoordinateGate,
    "eca": EcaGate,
    "efficient_attention": EfficientAttentionGate,
    "ela": ElaGate,
    "ese": EffectiveSqueezeExciteGate,
    "gc": GlobalContextGate,
    "ge": GatherExciteGate,
    "magc": MagcGate,
    "pixel": PixelGate,
    "psa": PsaGate,
    "scoord": SimpleCoordinateGate,
    "se": SqueezeExciteGate,
    "strip": StripGate,
    "triplet": TripletGate,
    "ulsam": UlsamGate,
}


def build_gate(spec: Spec, dim: int) -> Gate:
    """Build the gate that `spec` names: a name of `GATES` or `dict(type=name, **options)`.

    Raises:
        ValueError: if the name is unknown, an option is not one of the gate's or not of its type, or it does not fit
            the width.
    """
    gate: Gate = build_spec("gate", spec, GATES, dim)
    return gate
