"""Swin: two clones, one of the classification code and one of the detection code."""

from . import Recipe, Source, features_only, tokens

SWIN = Source("https://github.com/microsoft/Swin-Transformer", "f82860bfb5225915aca09c3227159ee9e1df874d", "MIT")
DENSE = Source(
    "https://github.com/SwinTransformer/Swin-Transformer-Object-Detection",
    "c7b20110addde0f74b1fbf812b403d16a59a87a9",
    "Apache-2.0",
)
CONSTANTS = ("relative_position_index", "attn_mask")

SMALL = {"embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 4]}

RECIPES = {
    "swin_t": Recipe(
        SWIN, "models/swin_transformer.py", "SwinTransformer", image=(1, 3, 224, 224), constants=CONSTANTS
    ),
    "swin_small_maps": Recipe(  # 8x16, 4x8 and 2x4 tokens: one window along one axis, and a smaller window
        SWIN,
        "models/swin_transformer.py",
        "SwinTransformer",
        {**SMALL, "img_size": (32, 64), "window_size": 4, "num_classes": 10, "mlp_ratio": 2.0},
        image=(2, 3, 32, 64),
        constants=CONSTANTS,
    ),
    "swin_small_maps_dense": Recipe(
        DENSE,
        "mmdet/models/backbones/swin_transformer.py",
        "SwinTransformer",
        {**SMALL, "out_indices": (0, 1, 2)},
        image=(1, 3, 70, 133),
        features=("layers.0", "layers.1", "layers.2"),
        layout=tokens,
        constants=CONSTANTS,
        run=features_only,
        stand_ins={"mmcv_custom": {}, "mmdet.utils": {}, "mmdet.models.builder": {}},
    ),
    "swin_t_dense": Recipe(
        DENSE,
        "mmdet/models/backbones/swin_transformer.py",
        "SwinTransformer",
        {"out_indices": ()},  # whose norms only it has
        image=(1, 3, 260, 333),
        features=("layers.0", "layers.1", "layers.2", "layers.3"),
        layout=tokens,
        constants=CONSTANTS,
        run=features_only,
        stand_ins={"mmcv_custom": {}, "mmdet.utils": {}, "mmdet.models.builder": {}},
    ),
}
