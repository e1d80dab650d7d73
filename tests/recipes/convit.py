"""ConViT, with the width of a head and the depth of local blocks that the authors' main.py passes by default."""

from . import Recipe, Source

CONVIT = Source("https://github.com/facebookresearch/convit", "0a9340aaf50dd101c2d3766e575f24085afc92ed", "Apache-2.0")

RECIPES = {
    name: Recipe(
        CONVIT,
        "models.py",
        name,
        {"embed_dim": 48, "local_up_to_layer": 10, "locality_strength": 1.0},
        features=("blocks.0", "blocks.9", "blocks.11", "norm"),
    )
    for name in ("convit_tiny", "convit_small", "convit_base")
}
