"""ConViT, with the width of a head and the depth of local blocks that the authors' main.py passes by default."""

from functools import partial

from torch import nn

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
} | {
    "convit_options": Recipe(
        CONVIT,
        "convit.py",
        "VisionTransformer",
        {
            "img_size": 48,
            "patch_size": 8,
            "in_chans": 2,
            "num_classes": 7,
            "embed_dim": 24,
            "depth": 3,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "qkv_bias": True,
            "local_up_to_layer": 1,
            "locality_strength": 0.5,
            "use_pos_embed": False,
            "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        },
        image=(2, 2, 48, 48),
    )
}
