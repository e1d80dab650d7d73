"""TaylorShift, in its direct form without gradients, for that one changes a view in place."""

import torch

from . import Recipe, Source

TAYLORSHIFT = Source("https://github.com/tobna/TaylorShift", "b290faa70df6736036e5d680f979d6bd38401fa8", "MIT")
NA = {"img_size": 224, "embed_dim": 96, "depth": 2, "num_heads": 2}


def always_linear(model):
    """Take the linear form whatever the number of tokens."""
    model.N0 = -1


@torch.no_grad()
def without_gradients(model, image):
    """Run the model for its logits."""
    return {"logits": model(image)}


RECIPES = {
    "taylorshift_na_direct": Recipe(
        TAYLORSHIFT,
        "taylor_shift.py",
        "TaylorShiftViT",
        NA,
        features=("blocks.0", "blocks.1", "norm"),
        run=without_gradients,
    ),
    "taylorshift_na_efficient": Recipe(
        TAYLORSHIFT,
        "taylor_shift.py",
        "TaylorShiftViT",
        NA,
        features=("blocks.0", "blocks.1", "norm"),
        change=always_linear,
    ),
    "taylorshift_options": Recipe(
        TAYLORSHIFT,
        "taylor_shift.py",
        "TaylorShiftViT",
        {
            "img_size": 80,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "num_classes": 10,
            "mlp_ratio": 3.0,
            "qkv_bias": False,
            "normalize_input": False,
            "output_normalized": False,
            "conv_embed": True,
            "init_values": 0.5,
        },
        image=(2, 3, 80, 80),
        features=("blocks.0", "blocks.1", "norm"),
    ),
    "taylorshift_pooled": Recipe(
        TAYLORSHIFT,
        "taylor_shift.py",
        "TaylorShiftViT",
        {
            "img_size": (32, 48),
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 4,
            "num_classes": 10,
            "global_pool": "avg",
            "no_embed_class": False,
        },
        image=(2, 3, 32, 48),
        features=("blocks.0", "blocks.1", "norm"),
    ),
}
