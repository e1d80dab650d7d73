"""PoolFormer."""

from timm.layers import to_2tuple

from . import Recipe, Source, features_only

POOLFORMER = Source("https://github.com/sail-sg/poolformer", "a075575b8b3dc3c76ecc5c49985d156167372bfa", "Apache-2.0")

FEATURES = ("network.0", "network.2", "network.4", "network.6")
STAND_INS = {
    "timm.models.layers.helpers": {"to_2tuple": to_2tuple},
    "mmseg.models.builder": {},
    "mmseg.utils": {},
    "mmdet.models.builder": {},
    "mmdet.utils": {},
    "mmcv.runner": {},
}


def model(factory, **options):
    """Return the recipe of a model."""
    return Recipe(POOLFORMER, "models/poolformer.py", factory, features=FEATURES, stand_ins=STAND_INS, **options)


DENSE = {
    "layers": (1, 2, 1, 1),
    "embed_dims": (8, 16, 24, 32),
    "mlp_ratios": (4, 4, 4, 4),
    "downsamples": (True, True, True, True),
    "fork_feat": True,
}
RECIPES = {
    "poolformer_s12": model("poolformer_s12"),
    "poolformer_dense": model("PoolFormer", kwargs=DENSE, image=(1, 3, 97, 130), run=features_only),
}
