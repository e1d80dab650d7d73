"""SHViT."""

from . import Recipe, Source

SHVIT = Source("https://github.com/ysj9909/SHViT", "6a729ccf18e0b941714b529638bd3d9bacebcef0", "MIT")

RECIPES = {
    "shvit_s1": Recipe(SHVIT, "model/build.py", "shvit_s1", features=("blocks1", "blocks2", "blocks3")),
    "shvit_options": Recipe(
        SHVIT,
        "model/shvit.py",
        "SHViT",
        {
            "embed_dim": [24, 32, 40],
            "partial_dim": [8, 0, 12],
            "qk_dim": [4, 16, 8],
            "depth": [1, 2, 1],
            "types": ["s", "i", "s"],
            "num_classes": 10,
            "in_chans": 4,
        },
        image=(2, 4, 72, 104),
        features=("blocks1", "blocks2", "blocks3"),
    ),
}
