"""TNT: inner and outer tokens."""

from . import Recipe, Source

TNT = Source(
    "https://github.com/huawei-noah/Efficient-AI-Backbones", "f90e129b645c3b1684fe07cd361cd557d0ad71f7", "Apache-2.0"
)

RECIPES = {
    f"tnt_{size}": Recipe(
        TNT,
        "tnt_pytorch/tnt.py",
        f"tnt_{size}_patch16_224",
        features=("blocks.0:0", "blocks.0:1", "blocks.11:0", "blocks.11:1", "norm"),
    )
    for size in ("s", "b")
}
