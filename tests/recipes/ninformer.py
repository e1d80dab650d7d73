"""NiNformer; the classifier stands in the training script."""

from . import Recipe, Source, class_of_script

NINFORMER = Source(
    "https://github.com/Abdullah-88/NiNformer", "0ec85d46a82ea9472fdd28dde0b70dc0ca62a91a", "BSD-3-Clause"
)


def check_sizes(image_size, patch_size):
    """Count the patches of a square image, as the function of that name in the script does."""
    return (image_size // patch_size) ** 2


def model(**kwargs):
    """Return the recipe of a model."""

    def build(module, **kwargs):
        module.check_sizes = check_sizes
        return class_of_script("train.py", "NiNformerImageClassification")(module, **kwargs)

    size = kwargs.get("image_size", 32)
    return Recipe(
        NINFORMER,
        "ninformer.py",
        build,
        kwargs,
        image=(2, 3, size, size),
        features=tuple(f"model.{i}" for i in range(kwargs.get("num_layers", 4))),
        notes="The class statement of train.py, by itself: the script trains when it is imported.",
    )


RECIPES = {
    "ninformer_cifar": model(),
    "ninformer_small": model(
        image_size=40, patch_size=8, num_classes=7, d_model=24, d_ffn=36, seq_len=25, num_layers=2
    ),
}
