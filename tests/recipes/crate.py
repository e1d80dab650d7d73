"""CRATE: the smallest by its factory, the others by the class, which takes small images and fewer blocks."""

from . import Recipe, Source

CRATE = Source("https://github.com/Ma-Lab-Berkeley/CRATE", "674408fa82475fe1f172aa8213e21d4ba608afc4", "MIT")


def model(depth=12, factory="CRATE", side=64, **kwargs):
    """Return the recipe of a model: the tokens after its first block, half of all, and all."""
    sizes = {"image_size": side, "patch_size": 16, "num_classes": 1000, "depth": depth, "dim_head": 64}
    return Recipe(
        CRATE,
        "model/crate.py",
        factory,
        {**sizes, **kwargs} if factory == "CRATE" else {},
        image=(2, 3, *(side if isinstance(side, tuple) else (side, side))),
        features=tuple(f"transformer.layers.{i}.1" for i in (0, depth // 2 - 1, depth - 1)),
    )


RECIPES = {
    "crate_tiny": model(factory="CRATE_tiny", side=224),
    "crate_small": model(2, dim=576, heads=12, dim_head=48),
    "crate_base": model(2, dim=768, heads=12),
    "crate_large": model(24, dim=1024, heads=16),
    "crate_options": model(4, dim=24, heads=2, dim_head=5, ista=0.3, patch_size=8, side=(16, 32), num_classes=10),
    "crate_one_head": model(2, dim=16, heads=1, dim_head=16, num_classes=10),
    "coding_rate": Recipe(
        CRATE,
        "vis_utils/coding_rate.py",
        "CodingRate",
        image=(4, 3, 10, 6),
        run=lambda rate, tokens: dict(zip(("mean", "std"), rate(tokens), strict=True)),
    ),
}
