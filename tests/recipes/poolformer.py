"""PoolFormer."""

from functools import partial

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


def metaformer(letters, depths=(1, 1, 2, 1), embed_dims=(8, 16, 32, 64)):
    """Return the recipe of a small network with attention in some stages, for images of 64 px."""

    def build(module, **kwargs):
        first = letters.index("a")
        positions = [None] * len(letters)
        side = 64 // (4 * 2**first)
        positions[first] = partial(module.AddPositionEmb, spatial_shape=[side, side])
        mixers = [{"p": module.Pooling, "a": module.Attention}[letter] for letter in letters]
        return module.MetaFormer(token_mixers=mixers, add_pos_embs=positions, **kwargs)

    build.__name__ = f"metaformer_{letters}"
    return Recipe(
        POOLFORMER,
        "models/metaformer.py",
        build,
        {"layers": depths, "embed_dims": embed_dims, "mlp_ratios": (4,) * 4, "downsamples": (True,) * 4},
        image=(2, 3, 64, 64),
        features=tuple(f"network.{i}" for i in (0, 2, *((5, 7) if letters == "ppaa" else (4, 7)))),
        stand_ins=STAND_INS,
    )


RECIPES = {
    "metaformer_ppaa": metaformer("ppaa"),
    "poolformer_s12": model("poolformer_s12"),
    "poolformer_dense": model("PoolFormer", kwargs=DENSE, image=(1, 3, 97, 130), run=features_only),
}
