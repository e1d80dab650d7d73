"""FFNet (MetaMixer's), at the resolution that it was trained at."""

from dataclasses import replace

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
RECIPES["ffnet_options"] = replace(
    RECIPES["ffnet_1"],
    kwargs={
        "depth": [1, 2, 3, 1],
        "embed_dim": [8, 16, 32, 64],
        "in_dim": 12,
        "kernel_sizes": [7, 3, 9, 5],
        "kernel_sizes1": [7, 3, 9, 5],
        "kernel_sizes2": [3, 7, 7, 9],
        "expansion_ratios": [2, 3, 4, 2],
        "use_ses": [True, False, True, True],
        "use_gelus": [False, True, False, True],
        "use_layer_scale": True,
        "layer_norm_last": True,
        "num_classes": 10,
    },
    image=(2, 3, 75, 101),
)
