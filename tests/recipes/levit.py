"""LeViT: both heads, and their mean."""

from . import Recipe, Source, tokens

LEVIT = Source("https://github.com/facebookresearch/LeViT", "3772b8e7517b900330ee1f46e11b0ae917dae323", "Apache-2.0")


def heads(model, image):
    """Return the mean of the heads as evaluation takes it, and each head."""
    logits = model(image)
    each = []
    hooks = [head.register_forward_hook(lambda *call: each.append(call[2])) for head in (model.head, model.head_dist)]
    model(image)
    for hook in hooks:
        hook.remove()
    return {"logits": logits, "logits_head": each[0], "logits_head_dist": each[1]}


RECIPES = {
    "levit_128s": Recipe(
        LEVIT,
        "levit.py",
        "LeViT_128S",
        features=("blocks.3", "blocks.11", "blocks.21"),
        layout=tokens,
        constants=("attention_bias_idxs",),
        run=heads,
        stress=(("attention_biases", 14.0), ("bn.weight", 1.1)),
    )
}
