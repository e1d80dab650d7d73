"""CrossViT, at the resolutions that the authors' main.py feeds."""

from functools import partial

from timm.layers import Mlp
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from . import Recipe, Source, patches

CROSSVIT = Source("https://github.com/IBM/CrossViT", "3f7ab77c5728b1c31a2d5cc6185ee9c7e754d952", "Apache-2.0")


class Block(TimmBlock):
    """timm's block with the arguments of timm 0.4.12."""

    def __init__(self, dim, num_heads, mlp_ratio, qkv_bias, drop, attn_drop, drop_path, norm_layer):
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, norm_layer=norm_layer)


def model(factory, side=240, batch=2, blocks=3, **kwargs):
    """Return the recipe of a model: after each multi-scale block the map of both branches."""
    return Recipe(
        CROSSVIT,
        "models/crossvit.py",
        factory,
        kwargs,
        image=(batch, 3, side, side),
        features=tuple(f"blocks.{block}:{branch}" for block in range(blocks) for branch in range(2)),
        layout=patches,
        stand_ins={"timm.models.vision_transformer": {"Mlp": Mlp, "Block": Block}},
    )


RECIPES = {
    f"crossvit_{size}": model(f"crossvit_{size}_224")
    for size in ("tiny", "small", "base", "9", "15", "18", "9_dagger", "15_dagger", "18_dagger")
} | {f"crossvit_{size}_dagger_384": model(f"crossvit_{size}_dagger_384", side=408, batch=1) for size in ("15", "18")}
RECIPES["crossvit_options"] = model(
    "VisionTransformer",
    side=48,
    blocks=2,
    img_size=[48, 32],
    patch_size=[12, 16],
    num_classes=10,
    embed_dim=[16, 24],
    depth=[[2, 1, 1], [1, 3, 1]],
    num_heads=[2, 3],
    mlp_ratio=[2.0, 3.0, 4.0],
    qkv_bias=False,
    norm_layer=partial(nn.LayerNorm, eps=1e-6),
    multi_conv=True,
)
