"""FcaFormer: feat0 is the stem's map, then what the layers leave, the last two as tokens; and the dense backbone."""

from torch import nn

from . import Recipe, Source

FCAFORMER = Source(
    "https://github.com/hkzhang-git/FcaFormer",
    "7dcd8e0ed207a6c74708ab10553dcd6a6d4ea2bd",
    "none given by the repository",
)


def without_heads(model):
    """Leave the maps as the layers give them: only the dense backbone has convolutions and norms after them."""
    for stage in range(4):
        for name in ("head", "norm"):
            setattr(model, f"{name}{stage}", nn.Identity())


RECIPES = {
    name: Recipe(
        FCAFORMER,
        "image_classification/models/fcaformer.py",
        name,
        features=("patch_embed", "layer_0", "layer_1", "layer_2", "layer_3"),
    )
    for name in ("fcaformer_l1", "fcaformer_l2", "fcaformer_l3", "fcaformer_l4")
}
RECIPES["fcaformer_l1_dense"] = Recipe(
    FCAFORMER,
    "mmdet/models/backbones/fcaformer.py",
    "FcaFormer_SH_512",
    {"dims": [64, 128, 192, 320], "depths": [2, 2, 6, 2], "num_heads": [0, 0, 6, 10]},
    root="object_detection",
    image=(1, 3, 260, 333),
    run=lambda model, image: {f"feat{i}": feature for i, feature in enumerate(model(image))},
    change=without_heads,
    stand_ins={"mmcv_custom": {}, "mmdet.utils": {}, "mmdet.models.builder": {}},
)
