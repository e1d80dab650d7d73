"""Dual attention transformers for images, at small sizes: each way to retrieve symbols but by place alone."""

from . import Recipe, Source

DUAL_ATTENTION = Source("https://github.com/Awni00/dual-attention", "a6ef87c6880d31fbebadb4855c64558dec3d713f", "MIT")
SMALL = {
    "image_shape": [3, 32, 32],
    "patch_size": [4, 4],
    "num_classes": 100,
    "d_model": 64,
    "n_layers": 3,
    "n_heads_sa": 2,
    "n_heads_ra": 2,
    "dropout_rate": 0.0,
    "norm_first": True,
}


def model(depth=3, **kwargs):
    """Return the recipe of a model."""
    return Recipe(
        DUAL_ATTENTION,
        "dual_attention/vision_models.py",
        "VisionDualAttnTransformer",
        SMALL | kwargs,
        image=(2, 3, 32, 32),
        features=("encoder_blocks.0", f"encoder_blocks.{depth - 1}"),
    )


RECIPES = {
    "dat_cifar": model(
        dff=128,
        activation="gelu",
        symbol_retrieval="symbolic_attention",
        symbol_retrieval_kwargs={"d_model": 64, "n_heads": 4, "n_symbols": 16},
        ra_kwargs={"n_relations": 4},
    ),
    "dat_readme_32": model(
        dff=160,
        activation="swiglu",
        symbol_retrieval="position_relative",
        symbol_retrieval_kwargs={"symbol_dim": 64, "max_rel_pos": 65},
        ra_kwargs={"symmetric_rels": True, "use_relative_positional_symbols": True},
    ),
    "dat_options": model(
        depth=2,
        num_classes=10,
        d_model=24,
        n_layers=2,
        n_heads_sa=1,
        dff=48,
        activation="relu",
        bias=False,
        symbol_retrieval="rel_sym_attn",
        symbol_retrieval_kwargs={
            "d_model": 24,
            "rel_n_heads": 3,
            "symbolic_attn_n_heads": 2,
            "n_symbols": 5,
            "nbhd_delta": 2,
            "causal_nbhd": False,
        },
        ra_kwargs={"n_relations": 4, "symmetric_rels": True, "rel_activation": "softmax"},
    ),
}
