"""GMM: attention with Gaussian mixtures in ViT, Swin and CaiT, with their distances in float64 from the start."""

import torch

from . import Recipe, Source

GMM = Source(
    "https://github.com/CatworldLee/Gaussian-Mixture-Mask-Attention", "b06b199c20425650c2e83a34e4f6a1f3d2720501", "none"
)
VIT = {"img_size": 32, "patch_size": 4, "num_classes": 100, "dim": 192, "depth": 9, "heads": 12, "dim_head": 16}
SMALL = {"img_size": 24, "patch_size": 4, "num_classes": 7, "dim": 24, "depth": 2, "heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "patch_size": 2, "mlp_ratio": 2}


def model(name, features, size=32, **kwargs):
    """Return the recipe of a model."""

    def build(module, **kwargs):
        torch.set_default_dtype(torch.float64)
        try:
            return getattr(module, name)(**kwargs, is_GMM=True)
        finally:
            torch.set_default_dtype(torch.float32)

    return Recipe(
        GMM,
        {"ViT": "models/vit.py", "SwinTransformer": "models/swin.py", "CaiT": "models/cait.py"}[name],
        build,
        kwargs,
        image=(2, 3, size, size),
        features=features,
        constants=("mask", "relative_position_index"),
        stress=(("sigma", 20.0), ("alpha", 4.0)),
        notes=f"{name} with is_GMM; built in float64, since distances in float32 end at ten patches.",
    )


RECIPES = {
    "gmm_vit_cifar": model("ViT", ("transformer",), **VIT, mlp_dim_ratio=2, num_kernals=5),
    "gmm_vit_small": model("ViT", ("transformer",), 24, **SMALL, dim_head=12, mlp_dim_ratio=3, num_kernals=3),
    "gmm_vit_wide_heads": model("ViT", ("transformer",), 24, **SMALL, dim_head=20, mlp_dim_ratio=2, num_kernals=2),
    "gmm_swin_cifar": model(
        "SwinTransformer",
        ("norm",),
        **SWIN,
        num_classes=10,
        depths=[2, 6, 4],
        num_heads=[3, 6, 12],
        num_kernals=5,
    ),
    "gmm_swin_small": model(
        "SwinTransformer",
        ("norm",),
        **SWIN,
        num_classes=7,
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 4],
        num_kernals=3,
    ),
    "gmm_cait_cifar": model(
        "CaiT",
        ("patch_transformer",),
        img_size=32,
        patch_size=4,
        num_classes=10,
        dim=108,
        num_kernals=5,
    ),
    "gmm_cait_small": model(
        "CaiT",
        ("patch_transformer",),
        24,
        **SMALL,
        cls_depth=3,
        mlp_dim=36,
        dim_head=5,
        num_kernals=3,
    ),
}
