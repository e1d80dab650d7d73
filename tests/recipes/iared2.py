"""IA-RED2 on DeiT, from a copy of the authors' model for evaluation."""

import torch
from torch import nn

from . import Recipe, Source

LTRP = Source("https://github.com/joon-stack/ltrp", "ba04d7f0f0acd5b72c7582f7277d1c81e153bcb1", "none")


def build(module, *, groups: list[int], **kwargs):
    """Build the model; the file's own function names groups and width."""
    options = {"patch_size": 16, "mlp_ratio": 4, "qkv_bias": True, "depth": sum(groups)}
    norm = module.partial(nn.LayerNorm, eps=1e-6)
    return module.PerBlock_VisionTransformer(
        module.VisionTransformer(norm_layer=norm, **{**options, **kwargs}), groups, -1, [3, 5, 8]
    )


def run(model: nn.Module, image: torch.Tensor):
    """Keep logits and what the agents say."""
    logits, _, probabilities = model(image)
    return {"logits": logits} | {f"feat{i}": p for i, p in enumerate(probabilities)}


RECIPES = {
    "iared2_deit_s": Recipe(
        LTRP,
        "score_net/ia_red_utils/IA_RED_model.py",
        build,
        {"embed_dim": 384, "num_heads": 6, "groups": [4, 4, 4]},
        run=run,
    ),
    "iared2_options": Recipe(
        LTRP,
        "score_net/ia_red_utils/IA_RED_model.py",
        build,
        {"embed_dim": 48, "num_heads": 3, "groups": [1, 2], "img_size": 64, "num_classes": 10},
        run=run,
        image=(2, 3, 64, 64),
    ),
}
