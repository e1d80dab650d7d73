"""EcoFormer: Energy-Saving Attention with Linear Complexity, NeurIPS 2022, https://arxiv.org/abs/2209.09004.

Facts from https://github.com/ziplab/EcoFormer at a277f9e (Apache-2.0); the code here is our own. Two other families of
the zoo, PVTv2 and Twins-PCPVT (whose frame Twins-SVT shares), with linear attention between binary codes in all stages
but the last, which has softmax attention of all tokens. As released: keys are not reduced, and Twins-SVT has neither
windows nor strides. The `_msa` forms, with softmax attention everywhere, are what training begins with: their
checkpoints load into the others, whose shared queries and keys take the weights of the queries, and those of PVTv2 and
Twins load into them, without the reduction of keys. `visionzoo fit-hashes` fits the hash functions; before that they
are random. Tokens without length are hashed as zeros here, where the authors divide by zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visionzoo.models import pcpvt, pvtv2
from visionzoo.models._contract import Contract
from visionzoo.models._registry import Published, Variant, register_family

_HASHED = [
    (r"\.fast_attention\.projection_matrix$", None),
    (r"\.attn\.fast_attention\.ksh\.A$", ".mixer.hash.weight"),
    (r"\.attn\.fast_attention\.ksh\.mvec$", ".mixer.hash.mean"),
    (r"\.attn\.fast_attention\.ksh\.anchor$", ".mixer.hash.anchor"),
    (r"\.attn\.to_(qk|v)\.", r".mixer.\1."),
]
_FROM_SOFTMAX = [
    (r"^(stages\.[012]\..*\.mixer)\.qkv\.", (r"\1.qk.", r"\1.k.", r"\1.v.")),
    (r"\.mixer\.k\.", None),
]


_FROM_REDUCED = [
    (r"\.mixer\.sr\.", None),
    (r"\.mixer\.q\.(weight|bias)$", r".mixer.qkv.\1#0"),
    (r"\.mixer\.kv\.(weight|bias)$", r".mixer.qkv.\1#1"),
]


def _keys(host: type[Contract]) -> dict[str, list[tuple[str, Any]]]:
    """Say how the authors' names, those of the softmax form and, for that form, those of the host become ours."""
    reduced = {"visionzoo": [], **host.CHECKPOINT_KEYS}
    return {
        "authors": [*_HASHED, *host.CHECKPOINT_KEYS["authors"]],
        "softmax form": _FROM_SOFTMAX,
        **{f"host, {names}": [*table, *_FROM_REDUCED] for names, table in reduced.items()},
    }


class EcoFormerPVTv2(pvtv2.PyramidVisionTransformerV2):
    """PVTv2 with hashed linear attention."""

    CHECKPOINT_KEYS = _keys(pvtv2.PyramidVisionTransformerV2)


class EcoFormerTwins(pcpvt.ConditionalPyramid):
    """Twins with hashed linear attention."""

    CHECKPOINT_KEYS = _keys(pcpvt.ConditionalPyramid)


def _softmax(host: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a host's variant, with softmax attention of all tokens in all stages."""
    return {**host, "mixers": [[{"type": "full", "qkv_bias": True}]] * 4}


def _hashed(host: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a host's variant, with softmax attention only in the last stage."""
    return {**host, "mixers": [[{"type": "hashed_linear"}]] * 3 + [[{"type": "full", "qkv_bias": True}]]}


_B0, _B1, _B2, _B3, _B4 = (pvtv2.VARIANTS[f"zoo_pvtv2_{size}"].kwargs for size in ("b0", "b1", "b2", "b3", "b4"))
_SVT_S = {
    "depths": (2, 2, 10, 4),
    "embed_dims": (64, 128, 256, 512),
    "num_heads": (2, 4, 8, 16),
    "mlp_ratios": (4.0, 4.0, 4.0, 4.0),
}
_SVT_B = {**_SVT_S, "depths": (2, 2, 18, 2), "embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
_SVT_L = {**_SVT_B, "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_README = "README.md of ziplab/EcoFormer; multiply-adds: its additions"
_NONE = "none were published"


def _no_weights(size: str) -> str:
    return (
        f"timm has none; the authors' are at "
        f"https://github.com/ziplab/EcoFormer/releases/download/v1.0/{size}_ecoformer.pth"
    )


PVTV2 = {
    "zoo_ecoformer_pvtv2_b0": Variant(
        _hashed(_B0), Published(gmacs=0.56, top1=70.44, source=_README), no_weights=_no_weights("pvtv2_b0")
    ),
    "zoo_ecoformer_pvtv2_b1": Variant(
        _hashed(_B1), Published(gmacs=2.09, top1=78.38, source=_README), no_weights=_no_weights("pvtv2_b1")
    ),
    "zoo_ecoformer_pvtv2_b2": Variant(
        _hashed(_B2), Published(gmacs=3.97, top1=81.28, source=_README), no_weights=_no_weights("pvtv2_b2")
    ),
    "zoo_ecoformer_pvtv2_b3": Variant(
        _hashed(_B3), Published(gmacs=6.75, top1=81.96, source=_README), no_weights=_no_weights("pvtv2_b3")
    ),
    "zoo_ecoformer_pvtv2_b4": Variant(
        _hashed(_B4), Published(gmacs=9.82, top1=81.90, source=_README), no_weights=_no_weights("pvtv2_b4")
    ),
    **{
        f"zoo_ecoformer_pvtv2_{size}_msa": Variant(_softmax(host), no_weights=_NONE)
        for size, host in (("b0", _B0), ("b1", _B1), ("b2", _B2), ("b3", _B3), ("b4", _B4))
    },
}
TWINS = {
    "zoo_ecoformer_twins_svt_s": Variant(
        _hashed(_SVT_S), Published(gmacs=2.81, top1=80.22, source=_README), no_weights=_no_weights("twins_svt_s")
    ),
    "zoo_ecoformer_twins_svt_b": Variant(_hashed(_SVT_B), no_weights=_NONE),
    "zoo_ecoformer_twins_svt_l": Variant(_hashed(_SVT_L), no_weights=_NONE),
    "zoo_ecoformer_twins_pcpvt_s": Variant(_hashed(pcpvt.VARIANTS["zoo_pcpvt_s"].kwargs), no_weights=_NONE),
    "zoo_ecoformer_twins_svt_s_msa": Variant(_softmax(_SVT_S), no_weights=_NONE),
}

TINY = {
    "zoo_ecoformer_pvtv2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_ecoformer_twins_svt_s": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
}

for model_cls, variants in ((EcoFormerPVTv2, PVTV2), (EcoFormerTwins, TWINS)):
    register_family(
        __name__,
        model_cls,
        variants,
        tiny=TINY,
        first_conv="stem.conv",
        paper_ids="arXiv:2209.09004",
        origin_url="https://github.com/ziplab/EcoFormer",
        license="apache-2.0",
    )
