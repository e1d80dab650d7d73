"""Mega's image classifiers. Their casts to float32 before the Fourier transforms are left out."""

from . import Recipe, Source, uncast

MEGA = Source("https://github.com/XuezheMax/mega-image", "df6b22f2abe45dc47c687c6eae1981abd72a1311", "MIT")


def model(size=224, **kwargs):
    """Return the recipe of a model."""
    return Recipe(
        MEGA,
        "pytorch-image-models/timm/models/vision_mega.py",
        "VisionMEGA",
        {"img_size": size, **kwargs},
        image=(2, 3, size, size),
        features=("blocks.0", f"blocks.{kwargs['depth'] - 1}", "final_norm"),
        layout=lambda output, image: output.transpose(0, 1).contiguous(),
        run=lambda model, image: {"logits": uncast(model, image)},
        stress=(("mega_layer.gamma", 100.0),),
        notes="The casts to float32 before the Fourier transforms are left out, for float64's digits.",
    )


TINY = {"patch_size": 16, "depth": 12, "embed_dim": 192, "hidden_dim": 384, "ffn_hidden_dim": 384, "zdim": 64}
SMALL = {"patch_size": 8, "depth": 2, "embed_dim": 16, "hidden_dim": 24, "ffn_hidden_dim": 40, "zdim": 6, "ndim": 3}

RECIPES = {
    "mega_tiny": model(**TINY, ndim=16),
    "mega_layernorm": model(48, **SMALL, num_classes=7, patch_impl="linear", representation_size=10),
    "mega_scalenorm": model(48, **SMALL, num_classes=7, norm_type="scalenorm", no_pos_emb=True),
    "mega_batchnorm": model(48, **SMALL, num_classes=7, norm_type="batchnorm"),
}
