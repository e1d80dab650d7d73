"""TransNeXt, with the repository's attention in plain torch (not the compiled one)."""

import types
from functools import partial
from typing import Any

from torch import nn

from . import Recipe, Source, features_only, tokens
from .moh import get_distribution

TRANSNEXT = Source(
    "https://github.com/DaiShiResearch/TransNeXt", "c8a99743b60ac94ac8d2bf66ffe164a440dcfe21", "Apache-2.0"
)


def model(factory: str, size: int = 224, **kwargs: Any) -> Recipe:
    """Return the recipe of a model for images of a size."""
    return Recipe(
        TRANSNEXT,
        "transnext.py",
        f"transnext_{factory}",
        kwargs={"img_size": size, **kwargs},
        root="classification",
        image=(2, 3, size, size),
        features=("norm1", "norm2", "norm3", "norm4"),
        layout=tokens,
        stand_ins={"pkg_resources": {"get_distribution": get_distribution, "DistributionNotFound": LookupError}},
    )


class _Registry:
    """A registry that registers nothing."""

    @staticmethod
    def register_module():
        return lambda kind: kind


def dense(module: types.ModuleType, **kwargs: Any) -> nn.Module:
    """Build a narrow dense backbone; its logarithms of numbers of keys in windows are float32, as in training."""
    found = module.get_seqlen_and_mask

    def rounded(*args: Any, **options: Any) -> tuple:
        length, padding = found(*args, **options)
        return length.float(), padding

    module.get_seqlen_and_mask = rounded
    return module.TransNeXt(
        patch_size=4,
        embed_dims=[24, 48, 48, 72],
        num_heads=[1, 2, 2, 3],
        mlp_ratios=[8, 8, 4, 4],
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        depths=[1, 1, 2, 1],
        **kwargs,
    )


RECIPES = {
    "transnext_dense": Recipe(
        TRANSNEXT,
        "transnext_native.py",
        dense,
        {"img_size": 96, "pretrain_size": 64},
        root="segmentation/upernet",
        image=(2, 3, 100, 150),
        features=("norm1", "norm2", "norm3", "norm4"),
        layout=tokens,
        run=features_only,
        stand_ins={
            "mmseg.models.builder": {"BACKBONES": _Registry},
            "mmseg.utils": {},
            "mmcv.runner": {},
        },
        notes="the logarithm of the number of keys is of float32 in the first three stages",
    ),
    "transnext_micro": model("micro"),
    "transnext_micro_aaaa": model("micro_AAAA", 256),
    "transnext_micro_pooled": model("micro", 256, pretrain_size=224, fixed_pool_size=5),
    "transnext_tiny": model("tiny"),
    "transnext_small": model("small"),
    "transnext_small_384": model("small", 384, pretrain_size=224),
    "transnext_base": model("base"),
    "transnext_base_384": model("base", 384, pretrain_size=224),
}
