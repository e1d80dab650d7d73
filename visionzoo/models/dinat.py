"""DiNAT: Dilated Neighborhood Attention Transformer, https://arxiv.org/abs/2209.15001.

Facts from https://github.com/SHI-Labs/Neighborhood-Attention-Transformer at d334f5b (MIT license); the code here is our
own. DiNAT is NAT with dilated neighborhoods in every second block; DiNATs (DiNAT_s in the paper) has the stem, the
downsampling and the sizes of Swin Transformer. The dilations suit the named input: they are the largest at which a
neighborhood fits into the map of each stage. Maps of smaller images are padded (see `NeighborhoodMixer`). For dense
tasks the authors dilate more, which `dilations=` takes:

- detection: ((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
- segmentation: ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)).

Weights load as those of NAT do; the authors' ImageNet-22K weights of the large sizes with `num_classes=21841`, and into
another kernel size, whose tables of biases are resized as for their 11×11 model. The published 200 M parameters of the
large size are 200.9 M in the authors' own code, 201.1 M with the 11×11 kernel.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.patch_merge import PatchMerge
from visionzoo.layers.stem import ConvNormStem
from visionzoo.models._pyramid import doubling
from visionzoo.models._registry import Published, Variant, register_family
from visionzoo.models.nat import NAT


class DiNAT(NAT):
    """Dilated Neighborhood Attention Transformer."""


class DiNATs(NAT):
    """Dilated Neighborhood Attention Transformer with the stem and downsampling of Swin Transformer."""

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^norm\d\.", None),
            (r"^patch_embed\.proj\.", "stem.conv."),
            (r"^patch_embed\.norm\.", "stem.norm."),
            (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
            (r"^layers\.(\d)\.", r"stages.\1."),
            (r"\.attn\.rpb$", ".mixer.relative_position_bias.table"),
            (r"\.attn\.", ".mixer."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
    }

    @staticmethod
    def _stem(in_chans: int, dim: int) -> nn.Module:
        return ConvNormStem(in_chans, dim, 4, 4, norm_layer=LayerNorm, pad_to_stride=True)

    @staticmethod
    def _downsample(in_dim: int, out_dim: int) -> nn.Module:
        return PatchMerge(in_dim, out_dim)


def _weights(name: str, tag: str = "shi_in1k") -> dict[str, Any]:
    return {"tag": tag, "hf_hub_id": f"shi-labs/dinat-{name}"}


def _no_weights(name: str) -> str:
    return f"the authors' are at https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_{name}.pth"


_README = "DiNAT.md of SHI-Labs/Neighborhood-Attention-Transformer"
_README_22K = f"{_README}, pre-trained on ImageNet-22K"
_DEEP, _SWIN_DEEP = (3, 4, 18, 5), (2, 2, 18, 2)
_AT_224, _AT_384 = ((1, 8), (1, 4), (1, 2), (1,)), ((1, 13), (1, 6), (1, 3), (1,))
_CFG_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_LARGE = {**doubling(192, _DEEP), "mlp_ratio": 2.0}
_LARGE_S = {**doubling(192, _SWIN_DEEP), "mlp_ratio": 4.0}

DINAT = {
    "zoo_dinat_mini": Variant(
        {**doubling(64, (3, 4, 6, 5)), "dilations": _AT_224},
        Published(20, 2.7, 81.8, source=_README),
        _weights("mini-in1k-224"),
    ),
    "zoo_dinat_tiny": Variant(
        {**doubling(64, _DEEP), "dilations": _AT_224},
        Published(28, 4.3, 82.7, source=_README),
        _weights("tiny-in1k-224"),
    ),
    "zoo_dinat_small": Variant(
        {**doubling(96, _DEEP), "mlp_ratio": 2.0, "dilations": _AT_224},
        Published(51, 7.8, 83.8, source=_README),
        _weights("small-in1k-224"),
    ),
    "zoo_dinat_base": Variant(
        {**doubling(128, _DEEP), "mlp_ratio": 2.0, "layer_scale": 1e-5, "dilations": _AT_224},
        Published(90, 13.7, 84.4, source=_README),
        _weights("base-in1k-224"),
    ),
    "zoo_dinat_large": Variant(
        {**_LARGE, "dilations": _AT_224},
        Published(200, 30.6, 86.6, source=_README_22K),
        _weights("large-in22k-in1k-224", "shi_in22k_ft_in1k"),
    ),
    "zoo_dinat_large_384": Variant(
        {**_LARGE, "dilations": _AT_384},
        Published(200, 89.7, 87.4, 384, _README_22K),
        {**_weights("large-in22k-in1k-384", "shi_in22k_ft_in1k"), **_CFG_384},
    ),
    "zoo_dinat_large_384_11x11": Variant(
        {**_LARGE, "kernel_size": 11, "dilations": _AT_224},
        Published(200, 92.4, 87.5, 384, _README_22K),
        {**_weights("large-11x11-in22k-in1k-384", "shi_in22k_ft_in1k"), **_CFG_384},
    ),
}
DINATS = {
    "zoo_dinats_tiny": Variant(
        {**doubling(96, (2, 2, 6, 2)), "mlp_ratio": 4.0, "dilations": _AT_224},
        Published(28, 4.5, 81.8, source=_README),
        no_weights=_no_weights("tiny_in1k_224"),
    ),
    "zoo_dinats_small": Variant(
        {**doubling(96, _SWIN_DEEP), "mlp_ratio": 4.0, "dilations": _AT_224},
        Published(50, 8.7, 83.5, source=_README),
        no_weights=_no_weights("small_in1k_224"),
    ),
    "zoo_dinats_base": Variant(
        {**doubling(128, _SWIN_DEEP), "mlp_ratio": 4.0, "dilations": _AT_224},
        Published(88, 15.4, 83.8, source=_README),
        no_weights=_no_weights("base_in1k_224"),
    ),
    "zoo_dinats_large": Variant(
        {**_LARGE_S, "dilations": _AT_224},
        Published(197, 34.5, 86.5, source=_README_22K),
        no_weights=_no_weights("large_in1k_224"),
    ),
    "zoo_dinats_large_384": Variant(
        {**_LARGE_S, "dilations": _AT_384},
        Published(197, 101.5, 87.4, 384, _README_22K),
        _CFG_384,
        no_weights=_no_weights("large_in1k_384"),
    ),
}

TINY: dict[str, dict[str, Any]] = {
    "zoo_dinats_tiny": {"depths": (2, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)},
    "zoo_dinat_mini": {
        "depths": (2, 1, 1, 1),
        "embed_dims": (8, 16, 16, 24),
        "num_heads": (1, 2, 2, 4),
        "kernel_size": 3,
        "dilations": ((1, 2), (1,), (2,), (1,)),
    },
}

for _model, _variants, _first_conv in ((DiNAT, DINAT, "stem.0"), (DiNATs, DINATS, "stem.conv")):
    register_family(
        __name__,
        _model,
        _variants,
        tiny=TINY,
        first_conv=_first_conv,
        paper_ids="arXiv:2209.15001",
        origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        license="mit",
    )
