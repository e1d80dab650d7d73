"""SpectFormer: the plain and the hierarchical networks.

Of the plain ones `ti` and `b` are not here: 6 heads stand in the authors' code, and their widths, 256 and 512, are no
multiples of 6.
"""

from . import Recipe, Source, stages, tokens

SPECTFORMER = Source(
    "https://github.com/badripatro/SpectFormers",
    "b6cf487a0ea71eeb252d5ba0fc7410b3f5dbd256",
    "none given by the repository",
)
STAND_INS = {"pytorch_wavelets": {}, "numpy.lib.arraypad": {}}


def plain(depth):
    """Return the recipe of a plain network; it has no factories."""
    return Recipe(
        SPECTFORMER,
        "spectformer.py",
        "SpectFormer",
        {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": depth, "mlp_ratio": 4},
        root="vanilla_architecture",
        features=(f"blocks.{depth - 1}",),
        layout=tokens,
        stand_ins=STAND_INS,
    )


def hierarchical(factory, *depths):
    """Return the recipe of a hierarchical network; the last map is that before the class token's blocks."""
    return Recipe(
        SPECTFORMER,
        "spectformer.py",
        factory,
        root="hierarchical_architecture",
        features=("norm1", "norm2", "norm3", stages("block4.{last}", depths)[3]),
        layout=tokens,
        stand_ins=STAND_INS,
    )


RECIPES = {
    "spectformer_xs": plain(12),
    "spectformer_s": plain(19),
    "spectformer_h_s": hierarchical("spectformer_s", 3, 4, 6, 3),
    "spectformer_h_b": hierarchical("spectformer_b", 3, 4, 12, 3),
    "spectformer_h_l": hierarchical("spectformer_l", 3, 6, 18, 3),
}
