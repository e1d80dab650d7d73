"""DaViT, in a copy of timm 0.4.13 that stands in its repository."""

from . import Recipe, Source, tokens

DAVIT = Source("https://github.com/dingmyu/davit", "fc79470d99babab23e45e0087790fa23cfd10a02", "MIT")


def model(factory, blocks, **more):
    """Return the recipe of a model: its maps after the last pair of each stage."""
    features = tuple(f"main_blocks.{stage}.{count - 1}" for stage, count in enumerate(blocks))
    return Recipe(DAVIT, "timm/models/davit.py", factory, features=features, layout=tokens, packages=True, **more)


RECIPES = {
    "davit_tiny": model("DaViT_tiny", (1, 1, 3, 1)),
    "davit_overlap": model(
        "DaViT",
        (1, 1, 1, 1),
        kwargs={
            "depths": (1, 1, 1, 1),
            "embed_dims": (16, 24, 32, 48),
            "num_heads": (1, 2, 2, 4),
            "window_size": 5,
            "mlp_ratio": 2.0,
            "qkv_bias": False,
            "overlapped_patch": True,
            "num_classes": 7,
        },
        image=(2, 3, 75, 122),
    ),
}
