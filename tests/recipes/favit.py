"""FaViT: factorization self-attention."""

from . import Recipe, Source, tokens

FAVIT = Source(
    "https://github.com/q2479036243/FaViT", "529b46be9a737537bff2e6f1a00e0455fc0ae802", "none given by the repository"
)

RECIPES = {
    name: Recipe(
        FAVIT,
        "FaViT/classification/favit.py",
        name,
        features=("norm1", "norm2", "norm3", "norm4"),
        layout=tokens,
    )
    for name in ("favit_b0", "favit_b1", "favit_b2", "favit_b3")
}
