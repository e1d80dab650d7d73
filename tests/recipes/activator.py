"""Activator: gated linear units with MLPs after them, and without; the classifier stands in their training script."""

from . import Recipe, Source, class_of_script

ACTIVATOR = Source(
    "https://github.com/Abdullah-88/Activator", "631c38a239b5ad1b4d211b080a4c06918a8e98cd", "BSD-3-Clause"
)


def model(file, script, **kwargs):
    """Return the recipe of a model."""
    blocks = kwargs.get("num_layers", 4)
    return Recipe(
        ACTIVATOR,
        file,
        class_of_script(script, "ACTIVATORImageClassification"),
        kwargs,
        image=(2, 3, 32, 32),
        features=tuple(f"model.{i}" for i in range(blocks)),
        notes="The class statement of the training script, by itself: the script trains when it is imported.",
    )


SMALL = {"num_classes": 7, "d_model": 24, "d_ffn": 36, "num_layers": 3, "patch_size": 8}

RECIPES = {
    "activator_cifar": model("activator.py", "train.py"),
    "activator_geglu_cifar": model("activator_only_GEGLU.py", "train_only_GEGLU.py"),
    "activator_small": model("activator.py", "train.py", **SMALL),
    "activator_geglu_small": model("activator_only_GEGLU.py", "train_only_GEGLU.py", **SMALL),
}
