"""FLatten Transformer: Vision Transformer using Focused Linear Attention, ICCV 2023, https://arxiv.org/abs/2308.00442."""

from __future__ import annotations

from typing import Any

from visionzoo.models.registry import Published, Variant, register_family
from visionzoo.models.swin import VARIANTS as SWIN
from visionzoo.models.swin import SwinTransformer


def _focused(*sizes: int | None, **options: Any) -> tuple[list[dict[str, Any]] | None, ...]:
    """Mixers of the stages: focused linear attention with a table of positions of these sizes, None for the host's."""
    spec = {"type": "focused_linear", **options}
    return tuple(None if size is None else [{**spec, "position_size": size}] for size in sizes)


_README = "README.md of LeapLabTHU/FLatten-Transformer"
_SWIN = {
    "zoo_flatten_swin_t": Variant(
        {**SWIN["zoo_swin_t"].kwargs, "mixers": _focused(56, 28, None, None)},
        Published(29, 4.5, 82.1, source=_README),
    ),
}
register_family(__name__, SwinTransformer, _SWIN, first_conv="stem.conv", crop_pct=0.9)
