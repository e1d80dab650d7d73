"""AFFNet: adaptive frequency filters, in a copy of CVNets.

The authors' training configurations are not in the repository: `affnet_et`, `affnet_t`, `affnet` take the settings of
CVNets' MobileViT (swish, layer_norm_2d); `_ln` has the command line's default norm and `_relu_ln` its activation, too.
"""

from argparse import Namespace

from . import Recipe, Source, uncast

AFFNET = Source("https://github.com/microsoft/TokenMixers", "99dbe38c2a5c3ea3c655b8c42c763a6d595e18f9", "MIT")
NOTES = "casts to float32 around the Fourier transforms are left out"
ROOT = "Adaptive Frequency Filters"


def options(activation):
    """Return the settings that layers read, by the names that the command line gives them."""
    return {
        "model.activation.name": activation,
        "model.activation.inplace": False,
        "model.activation.neg_slope": 0.1,
        "model.activation.sparsity_threshold": 0.01,
        "model.normalization.name": "batch_norm",
        "model.normalization.momentum": 0.1,
    }


def classifier(module, settings):
    """Build the classifier from its settings."""
    return module.AffNet(Namespace(**settings))


def model(mode, norm="layer_norm_2d", activation="swish"):
    """Return the recipe of a model."""
    prefix = "model.classification"
    settings = {
        f"{prefix}.affnet.mode": mode,
        f"{prefix}.affnet.number_heads": 4,
        f"{prefix}.affnet.head_dim": None,
        f"{prefix}.affnet.attn_norm_layer": norm,
        f"{prefix}.affnet.conv_kernel_size": 3,
        f"{prefix}.n_classes": 1000,
        f"{prefix}.classifier_dropout": 0.1,
        "model.layer.global_pool": "mean",
    }
    return Recipe(
        AFFNET,
        "affnet/models/classification/affnet.py",
        classifier,
        {"settings": settings | options(activation)},
        root=ROOT,
        image=(2, 3, 256, 256),
        features=("layer_1", "layer_2", "layer_3", "layer_4", "layer_5"),
        run=lambda model, image: {"logits": uncast(model, image)},
        packages=True,
        notes=NOTES,
    )


def layer(module, name, settings, **arguments):
    """Build a layer of the mixer."""
    return getattr(module, name)(Namespace(**settings), **arguments)


def mixer(name, **arguments):
    """Return the recipe of a layer: its output, and what it changes."""

    def run(layer, image):
        out = uncast(layer, image)
        return {"out": out, "change": out - image}

    return Recipe(
        AFFNET,
        "affnet/modules/aff_block.py",
        layer,
        {"name": name, "settings": options("swish"), "hidden_size": 64, "num_blocks": 8, **arguments},
        root=ROOT,
        image=(2, 64, 16, 16),
        run=run,
        packages=True,
        notes=NOTES,
    )


RECIPES = {
    "affnet_et": model("xx_small"),
    "affnet_t": model("x_small"),
    "affnet": model("small"),
    "affnet_et_ln": model("xx_small", "layer_norm"),
    "affnet_et_relu_ln": model("xx_small", "layer_norm", "relu"),
    "aff_filter_swish": mixer("AFNO2D_channelfirst", sparsity_threshold=0.01),
    "aff_block_swish": mixer("Block", dim=64, double_skip=False, mlp_ratio=2.0, attn_norm_layer="layer_norm_2d"),
}
