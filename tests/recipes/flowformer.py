"""Flowformer: the vision network; one size is published. `flowformer_tiny` is a small one for tests."""

from dataclasses import replace

from . import Recipe, Source

FLOWFORMER = Source("https://github.com/thuml/Flowformer", "61f5d8c83907955a8bc226af03b81b59b2724c8f", "MIT")


def model(embed_dim, depth):
    """Return the recipe of a model with the layer scale that the authors' main.py passes."""
    return Recipe(
        FLOWFORMER,
        "Flowformer_CV/flowformer.py",
        "Flowformer",
        {"embed_dim": embed_dim, "depth": depth, "init_values": 1e-5},
        features=("blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm"),
        stand_ins={"cv2": {}, "numpy.lib.arraypad": {}},
    )


RECIPES = {
    "flowformer_tiny": model((24, 48, 96, 192), (1, 1, 2, 1)),
    "flowformer": model((96, 192, 384, 768), (3, 3, 10, 3)),
}
RECIPES["flowformer_ratios"] = replace(
    RECIPES["flowformer_tiny"],
    kwargs={
        "img_size": 64,
        "num_classes": 10,
        "embed_dim": (24, 24, 48, 48),
        "depth": (1, 1, 1, 1),
        "mlp_ratio": (4, 3, 2, 1.5),
    },
    image=(2, 3, 64, 64),
)
