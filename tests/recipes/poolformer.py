"""PoolFormer."""

from timm.layers import to_2tuple

from . import Recipe, Source

POOLFORMER = Source("https://github.com/sail-sg/poolformer", "a075575b8b3dc3c76ecc5c49985d156167372bfa", "Apache-2.0")

RECIPES = {
    "poolformer_s12": Recipe(
        POOLFORMER,
        "models/poolformer.py",
        "poolformer_s12",
        features=("network.0", "network.2", "network.4", "network.6"),
        stand_ins={
            "timm.models.layers.helpers": {"to_2tuple": to_2tuple},
            "mmseg.models.builder": {},
            "mmseg.utils": {},
            "mmdet.models.builder": {},
            "mmdet.utils": {},
            "mmcv.runner": {},
        },
    )
}
