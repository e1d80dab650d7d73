"""FFNet (MetaMixer's), at the resolution that it was trained at."""

from . import Recipe, Source

FFNET = Source("https://github.com/ysj9909/FFNet", "f3c3e4c56821eb1665300abe9248e4d8ea0d9c02", "Apache-2.0")

RECIPES = {
    name: Recipe(
        FFNET,
        "models/ffnet.py",
        name,
        image=(2, 3, 256, 256),
        features=("stages.0", "stages.1", "stages.2", "stages.3"),
        stand_ins={"timm.models._builder": {}},  # settings of the data, whose helpers have other names now
    )
    for name in ("ffnet_1", "ffnet_2", "ffnet_3", "ffnet_4")
}
