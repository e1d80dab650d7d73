"""Sparsifiner, as src/main.py builds it from its configuration by default, and with tokens that are dropped."""

from types import SimpleNamespace as Options

from torch import nn

from . import Recipe, Source

SPARSIFINER = Source("https://github.com/lim142857/Sparsifiner", "9a11e2639c350b99bca3fa3f9d5ce9616505ca71", "MIT")
CONFIG = Options(
    SPAR=Options(
        BASIS_THRESHOLD=0.02,
        BASIS_COEF=Options(USE_TOPK=True, TOPK=8, THRESHOLD=0.05),
        ATTN_SCORE=Options(USE_TOPK=True, THRESHOLD=1e-4),
        PRUNE_ATTN_MATRIX_ROW=False,
        OUT_BASIS_SPARSITY=False,
        OUT_BASIS_COEF_SPARSITY=False,
        OUT_ATTN_MASK_SPARSITY=False,
    ),
    LOSS=Options(USE_ATTN_RECON=False),
)


def build(module, *, depth: int = 12, attn: float = 0.25, token: float = 1.0, after: tuple[int, ...] = (), **kwargs):
    """Build the model; tokens are dropped in the blocks `after`, by powers of the share."""
    powers = [sum(i >= first for first in after) for i in range(depth)]
    return module.Sparsifiner(
        depth=depth,
        attn_keep_rate_list=[attn] * depth,
        token_keep_rate_list=[token**power for power in powers],
        token_pruning_loc_indicator=[i in after for i in range(depth)],
        reduce_n_factor=6,
        reduce_c_factor=2,
        cfg=CONFIG,
        **kwargs,
    )


def run(model: nn.Module, image):
    """Keep logits and the normalized tokens of the map."""
    out = model(image)
    return {"logits": out["x"], "feat0": out["features"]}


SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 4, "num_classes": 10}
RECIPES = {
    "sparsifiner_s": Recipe(
        SPARSIFINER, "src/models/sparsifiner.py", build, {"embed_dim": 384, "num_heads": 6}, run=run
    ),
    "sparsifiner_s_pruned": Recipe(
        SPARSIFINER,
        "src/models/sparsifiner.py",
        build,
        {"embed_dim": 384, "num_heads": 6, "token": 0.7, "after": (3, 6, 9)},
        run=run,
    ),
    "sparsifiner_options": Recipe(
        SPARSIFINER,
        "src/models/sparsifiner.py",
        build,
        {**SMALL, "attn": 0.4, "token": 0.5, "after": (0, 1)},
        run=run,
        image=(2, 3, 64, 64),
    ),
}
