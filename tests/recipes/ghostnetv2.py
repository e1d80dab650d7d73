"""GhostNetV2, from the repository of TNT."""

from dataclasses import replace

from . import Recipe
from .tnt import TNT

GHOSTNETV2 = replace(TNT, license="none given for this folder of the repository")

RECIPES = {
    f"ghostnetv2_{width}": Recipe(
        GHOSTNETV2,
        "ghostnetv2_pytorch/model/ghostnetv2_torch.py",
        "ghostnetv2",
        {"num_classes": 1000, "width": width / 100, "dropout": 0.2, "args": None},
        features=("blocks.0", "blocks.2", "blocks.4", "blocks.6", "blocks.8"),
    )
    for width in (100, 130, 160)
}
