"""Learnable memory by a third party, as its authors published no code: logits of the new task and of the ViT's own."""

from timm.layers import to_2tuple

from . import Recipe, Source

VIT_PYTORCH = Source("https://github.com/lucidrains/vit-pytorch", "69d24fe9e3024c0d4b02761123b8583a24ebed1e", "MIT")


def adapter(module, vit, **kwargs):
    """Put a memory into a ViT."""
    return module.Adapter(vit=module.ViT(**vit), **kwargs)


def both_tasks(model, image):
    """Run the ViT in the model, and the model, whose tokens are kept."""
    return {"vit_logits": model.vit(image), "logits": model(image)}


def learnable_memory(vit, **kwargs):
    """Return the recipe of a model."""
    height, width = to_2tuple(vit["image_size"])
    return Recipe(
        VIT_PYTORCH,
        "vit_pytorch/learnable_memory_vit.py",
        adapter,
        {"vit": vit, **kwargs},
        image=(2, vit.get("channels", 3), height, width),
        features=("vit.transformer",),
        constants=("attn_mask",),
        run=both_tasks,
    )


RECIPES = {
    "memory_vit_tiny": learnable_memory(
        {
            "image_size": 64,
            "patch_size": 16,
            "num_classes": 100,
            "dim": 96,
            "depth": 4,
            "heads": 3,
            "mlp_dim": 192,
            "dim_head": 32,
        },
        num_classes=10,
        num_memories_per_layer=5,
    ),
    "memory_vit_options": learnable_memory(
        {
            "image_size": (32, 64),
            "patch_size": 8,
            "num_classes": 7,
            "dim": 32,
            "depth": 2,
            "heads": 3,
            "mlp_dim": 48,
            "dim_head": 16,
            "channels": 5,
        },
    ),
}
