"""DeiT: Training data-efficient image transformers & distillation through attention, https://arxiv.org/abs/2012.12877.

ICML 2021. Facts from https://github.com/facebookresearch/deit at 7e160fe (Apache-2.0); the code here is our own. It is
the plain transformer that papers on mixers and on fewer tokens (`reduce=`) build on. Models with a distillation token
are not here. Where we differ: images of any size and shape are taken, with positions interpolated. The published 5, 22
and 86 M parameters of tiny, small and base are 5.7, 22.1 and 86.6 M.
"""

from __future__ import annotations

from typing import Any

from visionzoo.models._isotropic import PlainTransformer
from visionzoo.models._registry import Published, Variant, register_family


class DeiT(PlainTransformer):
    """DeiT, without distillation token."""


def _weights(size: str) -> dict[str, Any]:
    return {"tag": "fb_in1k", "hf_hub_id": f"timm/deit_{size}_patch16_224.fb_in1k"}


_README = "README_deit.md of facebookresearch/deit"

VARIANTS = {
    "zoo_deit_t": Variant({}, Published(5, None, 72.2, source=_README, explained=("params_m",)), _weights("tiny")),
    "zoo_deit_s": Variant(
        {"embed_dim": 384, "num_heads": 6}, Published(22, None, 79.9, source=_README), _weights("small")
    ),
    "zoo_deit_b": Variant(
        {"embed_dim": 768, "num_heads": 12}, Published(86, None, 81.8, source=_README), _weights("base")
    ),
}

TINY = {"zoo_deit_t": {"depth": 2, "embed_dim": 16, "num_heads": 2}}

register_family(
    __name__,
    DeiT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    crop_pct=0.9,
    paper_ids="arXiv:2012.12877",
    origin_url="https://github.com/facebookresearch/deit",
    license="apache-2.0",
)
