"""CrossViT, at the resolutions that the authors' main.py feeds."""

from math import isqrt

from timm.layers import Mlp
from timm.models.vision_transformer import Block as TimmBlock

from . import Recipe, Source

CROSSVIT = Source("https://github.com/IBM/CrossViT", "3f7ab77c5728b1c31a2d5cc6185ee9c7e754d952", "Apache-2.0")


class Block(TimmBlock):
    """timm's block with the arguments of timm 0.4.12."""

    def __init__(self, dim, num_heads, mlp_ratio, qkv_bias, drop, attn_drop, drop_path, norm_layer):
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, norm_layer=norm_layer)


def patches(output, image):
    """Lay out the patches, without the class token before them, as a square map."""
    side = isqrt(output.shape[1] - 1)
    return output[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def model(factory, side=240, batch=2):
    """Return the recipe of a model: after each of three multi-scale blocks the map of both branches."""
    return Recipe(
        CROSSVIT,
        "models/crossvit.py",
        factory,
        image=(batch, 3, side, side),
        features=tuple(f"blocks.{block}:{branch}" for block in range(3) for branch in range(2)),
        layout=patches,
        stand_ins={"timm.models.vision_transformer": {"Mlp": Mlp, "Block": Block}},
    )


RECIPES = {
    f"crossvit_{size}": model(f"crossvit_{size}_224")
    for size in ("tiny", "small", "base", "9", "15", "18", "9_dagger", "15_dagger", "18_dagger")
} | {f"crossvit_{size}_dagger_384": model(f"crossvit_{size}_dagger_384", side=408, batch=1) for size in ("15", "18")}
