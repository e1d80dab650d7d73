"""Learnable memory by a third party, as its authors published no code: logits of the new task and of the ViT's own."""

from . import Recipe, Source

VIT_PYTORCH = Source("https://github.com/lucidrains/vit-pytorch", "69d24fe9e3024c0d4b02761123b8583a24ebed1e", "MIT")


def adapter(module, vit, **kwargs):
    """Put a memory into a ViT."""
    return module.Adapter(vit=module.ViT(**vit), **kwargs)


def both_tasks(model, image):
    """Run the ViT in the model, and the model, whose tokens are kept."""
    return {"vit_logits": model.vit(image), "logits": model(image)}


def learnable_memory(vit, side, **kwargs):
    """Return the recipe of a model."""
    return Recipe(
        VIT_PYTORCH,
        "vit_pytorch/learnable_memory_vit.py",
        adapter,
        {"vit": vit, **kwargs},
        image=(2, 3, side, side),
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
        64,
        num_classes=10,
        num_memories_per_layer=5,
    ),
}
