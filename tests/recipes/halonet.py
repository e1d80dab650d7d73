"""HaloNet: there is no code of the authors; the record is timm's."""

from . import Recipe, Source

TIMM = Source("https://github.com/huggingface/pytorch-image-models", "PyPI timm 1.0.31", "Apache-2.0")

RECIPES = {
    "halonet26t": Recipe(
        TIMM,
        "timm/models/byoanet.py",
        "halonet26t",
        image=(2, 3, 256, 256),
        features=("stages.0", "stages.1", "stages.2", "stages.3"),
        packages=True,
        stress=(("bn.weight", 1.3), ("post_attn.weight", 1.3)),
    )
}
