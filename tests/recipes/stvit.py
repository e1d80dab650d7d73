"""STViT: super token attention."""

from types import SimpleNamespace

from . import Recipe, Source, drawn, stages

STVIT = Source(
    "https://github.com/hhb072/STViT", "c9ed9a4a3d2f258a1626dff4330032a714e3fa92", "none given by the repository"
)
CONSTANTS = ("fold.weights",)  # of Fold and Unfold: identity kernels, parameters without gradient
STAND_INS = {"fvcore.nn": {}}


def model(size, *depths):
    """Return the recipe of a model; its factory reads two rates from the command line's arguments."""
    return Recipe(
        STVIT,
        "models/stvit.py",
        f"stvit_{size}",
        {"args": SimpleNamespace(drop=0.0, drop_path=0.1)},
        features=stages("layers.{}.blocks.{last}", depths),
        constants=CONSTANTS,
        stand_ins=STAND_INS,
    )


RECIPES = {
    "stvit_small": model("small", 3, 5, 9, 3),
    "stvit_base": model("base", 4, 6, 14, 6),
    "stvit_large": model("large", 4, 7, 19, 8),
    "stoken_attention_64": Recipe(
        STVIT,
        "models/stvit.py",
        "StokenAttention",
        {"dim": 64, "stoken_size": [4, 4], "num_heads": 2, "qkv_bias": True},
        image=(1, 64, 28, 28),
        constants=CONSTANTS,
        run=lambda layer, image: {
            "out": layer(drawn(1, image.shape)),
            "out_pad": layer(drawn(2, (1, 64, 18, 26))),
        },
        stand_ins=STAND_INS,
    ),
}
