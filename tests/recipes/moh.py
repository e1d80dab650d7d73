"""MoH-ViT: mixture of heads in TransNeXt, with the repository's attention in plain torch (not the compiled one)."""

from . import Recipe, Source, tokens

MOH = Source("https://github.com/SkyworkAI/MoH", "2cefd57b78196dd0fabc34a858a7739235f55356", "Apache-2.0")


def get_distribution(name):
    """Say that the package of their compiled attention is not installed."""
    raise LookupError(name)


def model(factory):
    """Return the recipe of a model."""
    return Recipe(
        MOH,
        "transnext.py",
        f"moh_transnext_{factory}",
        root="MoH-ViT",
        features=("norm1", "norm2", "norm3", "norm4"),
        layout=tokens,
        stand_ins={"pkg_resources": {"get_distribution": get_distribution, "DistributionNotFound": LookupError}},
    )


RECIPES = {
    "moh_vit_s_80": model("small_80"),
    "moh_vit_s_75": model("small_75"),
    "moh_vit_b_75": model("base_75"),
    "moh_vit_b_50": model("base_50"),
}
