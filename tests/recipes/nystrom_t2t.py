"""T2T-ViT with Nyström attention, its positions among what a record fills; and T2T-ViT_t, whose weights fit it."""

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block as TimmBlock

from . import Recipe, Source

NYSTROMFORMER = Source(
    "https://github.com/mlpen/Nystromformer", "56893131bf3fa99b5a2d3ab452a591dca722529a", "Apache-2.0"
)
T2T = Source("https://github.com/yitu-opensource/T2T-ViT", "0f63dc9558f4d192de926504dbddfa1b3f5db6ca", "Clear BSD")
SMALL = {
    "img_size": 112,
    "num_classes": 10,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "token_dim": 16,
}


class Block(TimmBlock):
    """timm's block with the arguments of T2T-ViT's."""

    def __init__(self, dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop, attn_drop, drop_path, norm_layer):
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, norm_layer=norm_layer)


def no_positions(n_position, d_hid):
    """Give the place of positions, which are filled."""
    return torch.zeros(1, n_position, d_hid)


def fixed_positions(model):
    """Make positions what they are, a table that does not learn."""
    table = model.pos_embed.data
    del model.pos_embed
    model.register_buffer("pos_embed", table)


def model(source, factory, kwargs, side, depth, **options):
    """Return the recipe of a model: tokens after the last block, and at the end."""
    return Recipe(
        source,
        "models/t2t_vit.py",
        factory,
        kwargs,
        image=(2, 3, side, side),
        features=(f"blocks.{depth - 1}", "norm"),
        filled=("pos_embed",),
        change=fixed_positions,
        **options,
    )


FILES_OF_T2T = {  # which the repository asks to copy from T2T-ViT
    "root": "ImageNet/T2T-ViT",
    "stand_ins": {
        "models.token_transformer": {"Token_transformer": None},
        "models.transformer_block": {"Block": Block, "Mlp": Mlp, "get_sinusoid_encoding": no_positions},
    },
}
RECIPES = {
    "t2t_nys_7": model(NYSTROMFORMER, "T2t_vit_nys_7", {"img_size": 224}, 224, 7, **FILES_OF_T2T),
    "t2t_nys_small": model(
        NYSTROMFORMER,
        "T2T_ViT",
        SMALL | {"tokens_type": "nystromformer", "qkv_bias": True},
        112,
        2,
        **FILES_OF_T2T,
    ),
    "t2t_t_small": model(T2T, "T2T_ViT", SMALL | {"tokens_type": "transformer"}, 112, 2),
}
