"""BiFormer: two models, and one layer of routed attention alone."""

import torch

from . import Recipe, Source

BIFORMER = Source("https://github.com/rayleizhu/BiFormer", "1697bbbeafb8680524898f1dcaac10defd0604be", "MIT")
STAND_INS = {"fairscale.nn.checkpoint": {}}  # for training in less memory


def routed(layer, image):
    """Return the layer's output and which windows it chose."""
    with torch.no_grad():
        chosen = layer(image, ret_attn_mask=True)[2]
    return {"output": layer(image), "routing_index": chosen}


RECIPES = {
    "biformer_tiny": Recipe(
        BIFORMER,
        "models/biformer.py",
        "biformer_tiny",
        features=("stages.0", "stages.1", "stages.2", "stages.3"),
        stand_ins=STAND_INS,
    ),
    "biformer_small": Recipe(BIFORMER, "models/biformer.py", "biformer_small", stand_ins=STAND_INS),
    "bra_layer": Recipe(
        BIFORMER,
        "ops/bra_legacy.py",
        "BiLevelRoutingAttention",
        {
            "dim": 64,
            "num_heads": 2,
            "n_win": 7,
            "qk_dim": 64,
            "kv_per_win": -1,
            "kv_downsample_mode": "identity",
            "topk": 4,
            "side_dwconv": 5,
        },
        image=(2, 56, 56, 64),
        run=routed,
    ),
}
