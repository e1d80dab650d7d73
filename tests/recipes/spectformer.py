"""SpectFormer: the plain and the hierarchical networks.

6 heads stand in the authors' code of the plain ones, which do not divide the widths of `ti` and `b`: other numbers are
put into the finished modules, with the scale that follows from them.
"""

from . import Recipe, Source, stages, tokens

SPECTFORMER = Source(
    "https://github.com/badripatro/SpectFormers",
    "b6cf487a0ea71eeb252d5ba0fc7410b3f5dbd256",
    "none given by the repository",
)
STAND_INS = {"pytorch_wavelets": {}, "numpy.lib.arraypad": {}}


def with_heads(module, num_heads, **kwargs):
    """Build a plain network with another number of heads than the code has; the tensors' shapes do not tell them."""
    model = module.SpectFormer(**kwargs)
    for block in model.blocks:
        if hasattr(block, "attn"):
            block.attn.num_heads, block.attn.scale = num_heads, (block.attn.dim // num_heads) ** -0.5
    return model


def plain(depth, dim=384, side=224, **heads):
    """Return the recipe of a plain network; it has no factories."""
    return Recipe(
        SPECTFORMER,
        "spectformer.py",
        with_heads if heads else "SpectFormer",
        {"img_size": side, "patch_size": 16, "embed_dim": dim, "depth": depth, "mlp_ratio": 4, **heads},
        root="vanilla_architecture",
        image=(2, 3, side, side),
        features=(f"blocks.{depth - 1}",),
        layout=tokens,
        stand_ins=STAND_INS,
        notes="the number of heads is put into the attention's modules" if heads else "",
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
    "spectformer_ti": plain(12, 256, 96, num_heads=4),
    "spectformer_xs": plain(12, side=64),
    "spectformer_s": plain(19),
    "spectformer_b": plain(19, 512, 64, num_heads=8),
    "spectformer_l": plain(12, 768, 64, num_heads=12),
    "spectformer_h_s": hierarchical("spectformer_s", 3, 4, 6, 3),
    "spectformer_h_b": hierarchical("spectformer_b", 3, 4, 12, 3),
    "spectformer_h_l": hierarchical("spectformer_l", 3, 6, 18, 3),
}
