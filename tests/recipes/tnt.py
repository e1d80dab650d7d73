"""TNT: inner and outer tokens."""

from . import Recipe, Source

TNT = Source(
    "https://github.com/huawei-noah/Efficient-AI-Backbones", "f90e129b645c3b1684fe07cd361cd557d0ad71f7", "Apache-2.0"
)

RECIPES = {
    f"tnt_{size}": Recipe(
        TNT,
        "tnt_pytorch/tnt.py",
        f"tnt_{size}_patch16_224",
        features=("blocks.0:0", "blocks.0:1", "blocks.11:0", "blocks.11:1", "norm"),
    )
    for size in ("s", "b")
} | {
    "tnt_options": Recipe(
        TNT,
        "tnt_pytorch/tnt.py",
        "TNT",
        {
            "img_size": (16, 24),
            "patch_size": 8,
            "num_classes": 10,
            "outer_dim": 24,
            "inner_dim": 12,
            "depth": 2,
            "outer_num_heads": 3,
            "inner_num_heads": 2,
            "mlp_ratio": 3.0,
            "qkv_bias": True,
            "inner_stride": 3,
            "se": 1,
        },
        image=(2, 3, 16, 24),
        features=("blocks.0:0", "blocks.0:1", "blocks.1:0", "blocks.1:1", "norm"),
    )
}
