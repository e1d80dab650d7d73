"""TransNeXt, with the repository's attention in plain torch (not the compiled one)."""

from typing import Any

from . import Recipe, Source, tokens
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


RECIPES = {
    "transnext_micro": model("micro"),
    "transnext_micro_aaaa": model("micro_AAAA", 256),
    "transnext_micro_pooled": model("micro", 256, pretrain_size=224, fixed_pool_size=5),
    "transnext_tiny": model("tiny"),
    "transnext_small": model("small"),
    "transnext_small_384": model("small", 384, pretrain_size=224),
    "transnext_base": model("base"),
    "transnext_base_384": model("base", 384, pretrain_size=224),
}
