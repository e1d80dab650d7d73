"""SHViT."""

from . import Recipe, Source

SHVIT = Source("https://github.com/ysj9909/SHViT", "6a729ccf18e0b941714b529638bd3d9bacebcef0", "MIT")

RECIPES = {
    "shvit_s1": Recipe(SHVIT, "model/build.py", "shvit_s1", features=("blocks1", "blocks2", "blocks3")),
}
