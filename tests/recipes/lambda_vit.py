"""DeiT whose attention degenerates into MLP: removed in some blocks, fading in others, at an epoch of its training."""

from functools import partial

from torch import nn

from . import Recipe, Source

LAMBDA_VIT = Source(
    "https://github.com/sihaoevery/lambda_vit", "4092b1758f07835a808eaee19fae628813c46307", "BSD-2-Clause"
)


def at_epoch(epoch):
    """Return what runs the model as in an epoch of its training."""
    return lambda model, image: {"logits": model(image, epoch)}


def model(side, depth, epoch, **kwargs):
    """Return the recipe of a model: tokens after the first and last block, and at the end."""
    return Recipe(
        LAMBDA_VIT,
        "models_small_timm3_lambda.py",
        "VisionTransformer",
        {
            "img_size": side,
            "depth": depth,
            "norm_layer": partial(nn.LayerNorm, eps=1e-6),
            "frozen_stages": -1,
            **kwargs,
        },
        image=(2, 3, side, side),
        features=("blocks.0", f"blocks.{depth - 1}", "norm"),
        run=at_epoch(epoch),
    )


SMALL = {"patch_size": 8, "num_classes": 10, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 3, "qkv_bias": True}
RECIPES = {
    "lambda_small_epoch_0": model(32, 4, 0, **SMALL, prune_layer=[1], done_layer=[0, 3]),
    "lambda_small_epoch_100": model(32, 4, 100, **SMALL, prune_layer=[1, 2], done_layer=[0]),
    "lambda_small_epoch_300": model(32, 4, 300, **SMALL, prune_layer=[1, 2], done_layer=[0]),
}
