"""FLatten Transformer: Vision Transformer using Focused Linear Attention, ICCV 2023, https://arxiv.org/abs/2308.00442.

Facts from https://github.com/LeapLabTHU/FLatten-Transformer at abdb115, which states no license (no file, not a word in
its README; the files derived from Swin and CSWin keep the MIT notes of those); the code here is our own. Four other
families of the zoo with focused linear attention in all stages (PVT, PVTv2) or in the first two (Swin, CSWin); the
others keep the mixers of their hosts. As released: linear attention spans the whole map and is neither shifted nor cut
into stripes; PVT has no class token, its keys are not reduced; CSWin's linear blocks have two convolutions of v. Where
we differ: PVT's last norm, which the authors have but do not use, is left out; the tables of positions are interpolated
where an image is of another size. The paper's FLatten-DeiT is not in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from visionzoo.models import cswin, pvt, pvtv2, swin
from visionzoo.models._pyramid import Pyramid
from visionzoo.models._registry import Published, Variant, register_family


def blocks_that(model: Pyramid, have: Callable[[Any], bool], stage: str) -> str:
    """Return a pattern of the authors' names of the blocks whose mixers have something; `stage` begins these names."""
    found = [
        rf"{stage}{i}\.{j}"
        for i, part in enumerate(model.stages, 1)
        for j, block in enumerate(part.blocks.children())  # type: ignore[union-attr, operator]
        if have(block.mixer)
    ]
    return rf"^({'|'.join(found) or '(?!)'})"


def qkv_in_two(model: Pyramid) -> list[tuple[str, Any]]:
    """Return keys that join what the authors of a PVT have as `q` and `kv`, where the mixer has one layer."""
    blocks = blocks_that(model, lambda mixer: hasattr(mixer, "qkv"), "block")
    return [
        (rf"{blocks}\.attn\.q\.(weight|bias)$", r"\1.mixer.qkv.\2#0"),
        (rf"{blocks}\.attn\.kv\.(weight|bias)$", r"\1.mixer.qkv.\2#1"),
    ]


def one_lepe(model: Pyramid) -> list[tuple[str, Any]]:
    """Return the key of a CSWin's convolution of v where the mixer has one, not one for each half of the channels."""
    blocks = blocks_that(model, lambda mixer: not isinstance(getattr(mixer, "lepe", None), nn.ModuleList), "stage")
    return [(rf"{blocks}\.attns\.0\.get_v\.", r"\1.mixer.lepe.")]


_POSITION = (r"\.attns?(\.0)?\.positional_encoding$", ".mixer.position.table")


class FLattenPVT(pvt.PyramidVisionTransformer):
    """PVT with focused linear attention."""

    @property
    def CHECKPOINT_KEYS(self) -> dict[str, list[tuple[str, Any]]]:  # type: ignore[override]
        """Say how the authors' names become ours, by the mixers that the stages have."""
        host = pvt.PyramidVisionTransformer.CHECKPOINT_KEYS["authors, without class token"]
        return {"authors": [*qkv_in_two(self), _POSITION, *host]}


class FLattenPVTv2(pvtv2.PyramidVisionTransformerV2):
    """PVTv2 with focused linear attention."""

    @property
    def CHECKPOINT_KEYS(self) -> dict[str, list[tuple[str, Any]]]:  # type: ignore[override]
        """Say how the authors' names become ours, by the mixers that the stages have."""
        host = pvtv2.PyramidVisionTransformerV2.CHECKPOINT_KEYS["authors"]
        return {"authors": [*qkv_in_two(self), _POSITION, *host]}


class FLattenSwin(swin.SwinTransformer):
    """Swin Transformer with focused linear attention."""

    CHECKPOINT_KEYS = {"authors": [_POSITION, *swin.SwinTransformer.CHECKPOINT_KEYS["authors"]]}


class FLattenCSWin(cswin.CSWinTransformer):
    """CSWin Transformer with focused linear attention."""

    @property
    def CHECKPOINT_KEYS(self) -> dict[str, list[tuple[str, Any]]]:  # type: ignore[override]
        """Say how the authors' names become ours, by the mixers that the stages have."""
        host = cswin.CSWinTransformer.CHECKPOINT_KEYS["authors"]
        parts = (r"\.attns\.0\.(scale$|dwc\.)", r".mixer.\1")
        return {"authors": [_POSITION, parts, *one_lepe(self), *host]}


def _focused(host: Mapping[str, Any], sizes: tuple[int | None, ...], **options: Any) -> dict[str, Any]:
    """Arguments of a host's variant, with focused linear attention in the stages that have a table of positions."""
    spec = {"type": "focused_linear", **options}
    return {**host, "mixers": [None if size is None else [{**spec, "position_size": size}] for size in sizes]}


_ALL, _FIRST_TWO, _FIRST_TWO_384 = (56, 28, 14, 7), (56, 28, None, None), (96, 48, None, None)
_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_PAPER, _README = "paper, figure 6", "README.md of LeapLabTHU/FLatten-Transformer"
_BOTH = f"{_README}; {_PAPER}"
_CLOUD = "the authors' are linked in https://github.com/LeapLabTHU/FLatten-Transformer#pretrained-models"
_NONE = "none were published"

PVT = {
    "zoo_flatten_pvt_t": Variant(
        _focused(pvt.VARIANTS["zoo_pvt_t"].kwargs, _ALL), Published(12.2, 2.0, 77.8, source=_BOTH), no_weights=_CLOUD
    ),
    "zoo_flatten_pvt_s": Variant(
        _focused(pvt.VARIANTS["zoo_pvt_s"].kwargs, _ALL), Published(21.7, 4.0, 81.7, source=_PAPER), no_weights=_NONE
    ),
    "zoo_flatten_pvt_m": Variant(_focused(pvt.VARIANTS["zoo_pvt_m"].kwargs, _ALL), no_weights=_NONE),
    "zoo_flatten_pvt_l": Variant(_focused(pvt.VARIANTS["zoo_pvt_l"].kwargs, _ALL), no_weights=_NONE),
}
PVTV2 = {
    "zoo_flatten_pvtv2_b0": Variant(
        _focused(pvtv2.VARIANTS["zoo_pvtv2_b0"].kwargs, _ALL), Published(top1=71.1, source=_README), no_weights=_CLOUD
    ),
    "zoo_flatten_pvtv2_b1": Variant(
        _focused(pvtv2.VARIANTS["zoo_pvtv2_b1"].kwargs, _ALL),
        Published(12.9, 2.2, 79.5, source=_PAPER),
        no_weights=_NONE,
    ),
    "zoo_flatten_pvtv2_b2": Variant(
        _focused(pvtv2.VARIANTS["zoo_pvtv2_b2"].kwargs, _ALL),
        Published(22.6, 4.3, 82.5, source=_PAPER),
        no_weights=_NONE,
    ),
    "zoo_flatten_pvtv2_b3": Variant(_focused(pvtv2.VARIANTS["zoo_pvtv2_b3"].kwargs, _ALL), no_weights=_NONE),
    "zoo_flatten_pvtv2_b4": Variant(_focused(pvtv2.VARIANTS["zoo_pvtv2_b4"].kwargs, _ALL), no_weights=_NONE),
}
SWIN = {
    "zoo_flatten_swin_t": Variant(
        _focused(swin.VARIANTS["zoo_swin_t"].kwargs, _FIRST_TWO),
        Published(29, 4.5, 82.1, source=_BOTH),
        no_weights=_CLOUD,
    ),
    "zoo_flatten_swin_s": Variant(
        _focused(swin.VARIANTS["zoo_swin_s"].kwargs, _FIRST_TWO),
        Published(51, 8.7, 83.5, source=_BOTH),
        no_weights=_CLOUD,
    ),
    "zoo_flatten_swin_b": Variant(
        _focused(swin.VARIANTS["zoo_swin_b"].kwargs, _FIRST_TWO),
        Published(89, 15.4, 83.8, source=_BOTH),
        no_weights=_CLOUD,
    ),
    "zoo_flatten_swin_b_384": Variant(
        _focused(swin.VARIANTS["zoo_swin_b_384"].kwargs, _FIRST_TWO_384),
        Published(91, 46.5, 85.0, 384, _BOTH),
        _AT_384,
        no_weights=_CLOUD,
    ),
}
_CSWIN_T = {**cswin.VARIANTS["zoo_cswin_t"].kwargs, "depths": (2, 4, 18, 1)}
_CSWIN_B, _CSWIN_B_384 = (
    {**cswin.VARIANTS[name].kwargs, "depths": (3, 6, 29, 2)} for name in ("zoo_cswin_b", "zoo_cswin_b_384")
)
CSWIN = {
    "zoo_flatten_cswin_t": Variant(
        _focused(_CSWIN_T, _FIRST_TWO, lepe_kernel=3), Published(21, 4.3, 83.1, source=_BOTH), no_weights=_CLOUD
    ),
    "zoo_flatten_cswin_s": Variant(
        _focused(cswin.VARIANTS["zoo_cswin_s"].kwargs, _FIRST_TWO, lepe_kernel=3),
        Published(35, 6.9, 83.8, source=_PAPER),
        no_weights=_NONE,
    ),
    "zoo_flatten_cswin_b": Variant(
        _focused(_CSWIN_B, _FIRST_TWO, lepe_kernel=3), Published(75, 15.0, 84.5, source=_PAPER), no_weights=_NONE
    ),
    "zoo_flatten_cswin_b_384": Variant(
        _focused(_CSWIN_B_384, _FIRST_TWO_384, lepe_kernel=3),
        Published(78, 46.4, 85.5, 384, _PAPER),
        _AT_384,
        no_weights=_NONE,
    ),
}

TINY = {
    "zoo_flatten_swin_t": {"depths": (1, 2, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_flatten_pvt_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_flatten_pvtv2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_flatten_cswin_t": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (2, 2, 4, 4)},
}

for model_cls, variants, first_conv in (
    (FLattenPVT, PVT, "stem.0.conv"),
    (FLattenPVTv2, PVTV2, "stem.conv"),
    (FLattenSwin, SWIN, "stem.conv"),
    (FLattenCSWin, CSWIN, "stem.conv"),
):
    register_family(
        __name__,
        model_cls,
        variants,
        tiny=TINY,
        first_conv=first_conv,
        paper_ids="arXiv:2308.00442",
        origin_url="https://github.com/LeapLabTHU/FLatten-Transformer",
        license="unknown",
    )
