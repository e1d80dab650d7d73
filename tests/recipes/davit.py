"""DaViT, in a copy of timm 0.4.13 that stands in its repository."""

from . import Recipe, Source, tokens

DAVIT = Source("https://github.com/dingmyu/davit", "fc79470d99babab23e45e0087790fa23cfd10a02", "MIT")

RECIPES = {
    "davit_tiny": Recipe(
        DAVIT,
        "timm/models/davit.py",
        "DaViT_tiny",
        features=("main_blocks.0.0", "main_blocks.1.0", "main_blocks.2.2", "main_blocks.3.0"),
        layout=tokens,
        packages=True,
    ),
}
