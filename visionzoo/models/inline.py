"""InLine: Bridging the Divide, Reconsidering Softmax and Linear Attention, https://arxiv.org/abs/2412.06590.

NeurIPS 2024. Facts from https://github.com/LeapLabTHU/InLine at e463a6f, which states no license (the files derived
from Swin and CSWin keep the MIT notes of those); the code here is our own. DeiT and three other families of the zoo
with injective linear attention: DeiT in all blocks, narrower and, small and base, for images of 288 and 448 px; PVT in
all stages, without class token, last norm and reduction; Swin in the first three stages (tiny), two (small), or two and
two blocks of the third (base), the others with windows as in Swin; CSWin in the first two, with its own convolution of
v besides the predicted one, whose kernels come from the map before the norm.
Attention spans the whole map whatever its size; the authors' code has it inside windows of 56 where a map is larger,
which `mixers={"type": "injective_linear", "window_size": 56}` gives. Of the published parameters Swin's 30 M (tiny) are
29.2 M, CSWin's 25 M, 43 M and 96 M are 20.6 M, 33.0 M and 73.4 M, in the authors' own code with their configurations
too. InLine-DeiT with a distillation token is not here: the authors' code has the option, but stops in its first block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visionzoo.models import cswin, flatten, pvt, swin
from visionzoo.models._registry import Published, Variant, register_family
from visionzoo.models.deit import DeiT


class InLineDeiT(DeiT):
    """DeiT with injective linear attention."""

    MIXER = "injective_linear"


class InLinePVT(pvt.PyramidVisionTransformer):
    """PVT with injective linear attention."""

    @property
    def CHECKPOINT_KEYS(self) -> dict[str, list[tuple[str, Any]]]:  # type: ignore[override]
        """Say how the authors' names become ours, by the mixers that the stages have."""
        host = pvt.PyramidVisionTransformer.CHECKPOINT_KEYS["authors, without class token"]
        return {"authors": [*flatten.qkv_in_two(self), *host]}


class InLineSwin(swin.SwinTransformer):
    """Swin Transformer with injective linear attention."""


class InLineCSWin(cswin.CSWinTransformer):
    """CSWin Transformer with injective linear attention."""

    @property
    def CHECKPOINT_KEYS(self) -> dict[str, list[tuple[str, Any]]]:  # type: ignore[override]
        """Say how the authors' names become ours, by the mixers that the stages have."""
        host = cswin.CSWinTransformer.CHECKPOINT_KEYS["authors"]
        residual = (r"\.attns\.0\.residual\.", ".mixer.residual.")
        return {"authors": [residual, *flatten.one_lepe(self), *host]}


def _injective(host: Mapping[str, Any], stages: str, **options: Any) -> dict[str, Any]:
    """Arguments of a host's variant with other mixers: in a stage "I" everywhere, "M" in two blocks, "S" nowhere."""
    spec = {"type": "injective_linear", **options}
    mixed = [spec, spec] + [{"type": "window"}] * (host["depths"][2] - 2)
    return {**host, "mixers": [{"I": [spec], "M": mixed, "S": None}[stage] for stage in stages]}


def _pvt(size: str) -> dict[str, Any]:
    return _injective({**pvt.VARIANTS[f"zoo_pvt_{size}"].kwargs, "num_heads": (2, 4, 10, 16)}, "IIII")


_README = "README.md of LeapLabTHU/InLine"
_CLOUD = "the authors' are linked in https://github.com/LeapLabTHU/InLine#pretrained-models"
_NONE = "none were published"
_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}


def _deit(embed_dim: int, num_heads: int, size: int, params_m: float, gmacs: float, top1: float) -> Variant:
    return Variant(
        {"embed_dim": embed_dim, "num_heads": num_heads, "img_size": size},
        Published(params_m, gmacs, top1, size, _README),
        {"input_size": (3, size, size)},
        no_weights=_CLOUD,
    )


DEIT = {
    "zoo_inline_deit_t": _deit(192, 6, 224, 6.5, 1.1, 74.5),
    "zoo_inline_deit_s": _deit(320, 10, 288, 16.7, 5.0, 80.2),
    "zoo_inline_deit_b": _deit(384, 12, 448, 23.8, 17.2, 82.3),
}
PVT = {
    "zoo_inline_pvt_t": Variant(_pvt("t"), Published(12.0, 2.0, 78.2, source=_README), no_weights=_CLOUD),
    "zoo_inline_pvt_s": Variant(_pvt("s"), Published(21.6, 3.9, 82.0, source=_README), no_weights=_CLOUD),
    "zoo_inline_pvt_m": Variant(_pvt("m"), Published(37.6, 6.9, 83.2, source=_README), no_weights=_CLOUD),
    "zoo_inline_pvt_l": Variant(_pvt("l"), Published(50.2, 10.2, 83.6, source=_README), no_weights=_CLOUD),
}
SWIN = {
    "zoo_inline_swin_t": Variant(
        _injective(swin.VARIANTS["zoo_swin_t"].kwargs, "IIIS"),
        Published(30, 4.5, 82.4, source=_README, explained=("params_m",)),
        no_weights=_CLOUD,
    ),
    "zoo_inline_swin_s": Variant(
        _injective(swin.VARIANTS["zoo_swin_s"].kwargs, "IISS"),
        Published(50, 8.7, 83.6, source=_README),
        no_weights=_CLOUD,
    ),
    "zoo_inline_swin_b": Variant(
        _injective(swin.VARIANTS["zoo_swin_b"].kwargs, "IIMS"),
        Published(88, 15.4, 84.1, source=_README),
        no_weights=_CLOUD,
    ),
    "zoo_inline_swin_b_384": Variant(
        _injective(swin.VARIANTS["zoo_swin_b_384"].kwargs, "IIMS"), Published(size=384), _AT_384, no_weights=_NONE
    ),
}
_CSWIN = {"lepe_kernel": 3, "sees_input": True}
_CSWIN_B, _CSWIN_B_384 = (
    {**cswin.VARIANTS[name].kwargs, "depths": (3, 6, 29, 2)} for name in ("zoo_cswin_b", "zoo_cswin_b_384")
)
CSWIN = {
    "zoo_inline_cswin_t": Variant(
        _injective({**cswin.VARIANTS["zoo_cswin_t"].kwargs, "depths": (2, 4, 18, 1)}, "IISS", **_CSWIN),
        Published(25, 4.3, 83.2, source=_README, explained=("params_m",)),
        no_weights=_CLOUD,
    ),
    "zoo_inline_cswin_s": Variant(
        _injective({**cswin.VARIANTS["zoo_cswin_s"].kwargs, "depths": (3, 6, 29, 2)}, "IISS", **_CSWIN),
        Published(43, 6.8, 83.8, source=_README, explained=("params_m",)),
        no_weights=_CLOUD,
    ),
    "zoo_inline_cswin_b": Variant(
        _injective(_CSWIN_B, "IISS", **_CSWIN),
        Published(96, 14.9, 84.5, source=_README, explained=("params_m",)),
        no_weights=_CLOUD,
    ),
    "zoo_inline_cswin_b_384": Variant(
        _injective(_CSWIN_B_384, "IISS", **_CSWIN), Published(size=384), _AT_384, no_weights=_NONE
    ),
}

TINY: dict[str, Mapping[str, Any]] = {
    "zoo_inline_deit_t": {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 64},
    "zoo_inline_swin_t": {"depths": (1, 2, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_inline_pvt_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_inline_cswin_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (2, 2, 4, 4)},
}

for model_cls, variants, first_conv, pool_size in (
    (InLinePVT, PVT, "stem.0.conv", (7, 7)),
    (InLineSwin, SWIN, "stem.conv", (7, 7)),
    (InLineCSWin, CSWIN, "stem.conv", (7, 7)),
    (InLineDeiT, DEIT, "stem.conv", None),
):
    register_family(
        __name__,
        model_cls,
        variants,
        tiny=TINY,
        first_conv=first_conv,
        pool_size=pool_size,
        paper_ids="arXiv:2412.06590",
        origin_url="https://github.com/LeapLabTHU/InLine",
        license="unknown",
    )
