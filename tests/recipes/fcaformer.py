"""FcaFormer: feat0 is the stem's map, then what the four layers leave, the last two as tokens."""

from . import Recipe, Source

FCAFORMER = Source(
    "https://github.com/hkzhang-git/FcaFormer",
    "7dcd8e0ed207a6c74708ab10553dcd6a6d4ea2bd",
    "none given by the repository",
)

RECIPES = {
    name: Recipe(
        FCAFORMER,
        "image_classification/models/fcaformer.py",
        name,
        features=("patch_embed", "layer_0", "layer_1", "layer_2", "layer_3"),
    )
    for name in ("fcaformer_l1", "fcaformer_l2", "fcaformer_l3", "fcaformer_l4")
}
