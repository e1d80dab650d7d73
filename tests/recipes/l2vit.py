"""L2ViT: linear attention with local concentration."""

from . import Recipe, Source, tokens

L2VIT = Source("https://github.com/ChuanyangZheng/L2ViT", "fad0341cf0c31464482d0550fb3127001b4b921b", "MIT")


def model(factory, image=(2, 3, 224, 224)):
    """Return the recipe of a model."""
    return Recipe(
        L2VIT,
        "classification/models/l2vit.py",
        factory,
        image=image,
        features=("stages.0", "stages.1", "stages.2", "stages.3"),
        layout=tokens,
    )


RECIPES = {
    "l2vit_tiny": model("L2ViT_Tiny"),
    "l2vit_small": model("L2ViT_Small"),
    "l2vit_base": model("L2ViT_Base"),
    "l2vit_base_384": model("L2ViT_Base_384", (1, 3, 384, 384)),
}
