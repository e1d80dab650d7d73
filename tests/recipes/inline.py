"""InLine: injective linear attention in four hosts, with the arguments of the repository's cfgs/*.yaml."""

from dataclasses import replace

from . import Recipe, Source, patches, stages, tokens

INLINE = Source(
    "https://github.com/LeapLabTHU/InLine", "e463a6f4dbb95893726b294ff83f61a58644bf6e", "none given by the repository"
)


def build_model_with_cfg(
    model_class, variant, pretrained, default_cfg, pretrained_filter_fn, pretrained_custom_load, **kwargs
):
    """Call the class: what timm 0.4.12 did beside that concerns checkpoints."""
    return model_class(**kwargs)


def deit(size, side=224):
    """Return the recipe of a DeiT for images of `side` pixels; of its blocks the first two are kept."""
    return Recipe(
        INLINE,
        "models/inline_deit.py",
        f"inline_deit_{size}",
        {"img_size": side},
        image=(2, 3, side, side),
        features=("blocks.0", "blocks.1"),
        layout=patches,
        stand_ins={"timm.models.helpers": {"build_model_with_cfg": build_model_with_cfg}},
    )


def pvt(size, *depths):
    """Return the recipe of a PVT."""
    return Recipe(
        INLINE,
        "models/inline_pvt.py",
        f"inline_pvt_{size}",
        {"attn_type": "IIII", "la_sr_ratios": "1111"},
        features=stages("block{}.{last}", depths, first=1),
        layout=tokens,
    )


def swin(embed_dim, depths, num_heads, attn_type, window_size=56, image=(2, 3, 224, 224)):
    """Return the recipe of a Swin."""
    return Recipe(
        INLINE,
        "models/inline_swin.py",
        "InLineSwin",
        {
            "img_size": image[-1],
            "embed_dim": embed_dim,
            "depths": depths,
            "num_heads": num_heads,
            "window_size": window_size,
            "attn_type": attn_type,
        },
        image=image,
        features=stages("layers.{}.blocks.{last}", depths),
        layout=tokens,
        constants=("relative_position_index", "attn_mask"),
    )


def cswin(factory, depths, la_split_size="56-28-14-7", image=(2, 3, 224, 224)):
    """Return the recipe of a CSWin."""
    return Recipe(
        INLINE,
        "models/inline_cswin.py",
        f"inline_cswin_{factory}",
        {"img_size": image[-1], "attn_type": "IISS", "la_split_size": la_split_size},
        image=image,
        features=stages("stage{}.{last}", depths, first=1),
        layout=tokens,
    )


RECIPES = {
    "inline_deit_t": deit("tiny"),
    "inline_deit_s": deit("small", 96),
    "inline_deit_b": deit("base", 64),
    "inline_pvt_t": pvt("tiny", 2, 2, 2, 2),
    "inline_pvt_s": pvt("small", 3, 4, 6, 3),
    "inline_pvt_m": pvt("medium", 3, 4, 18, 3),
    "inline_pvt_l": pvt("large", 3, 8, 27, 3),
    "inline_swin_t": swin(96, (2, 2, 6, 2), (3, 6, 12, 24), "IIIS"),
    "inline_swin_s": swin(96, (2, 2, 18, 2), (3, 6, 12, 24), "IISS"),
    "inline_swin_b": swin(128, (2, 2, 18, 2), (4, 8, 16, 32), "IIMS2"),
    "inline_swin_b_384": swin(128, (2, 2, 18, 2), (4, 8, 16, 32), "IIMS2", 96, (1, 3, 384, 384)),
    "inline_cswin_t": cswin("tiny", (2, 4, 18, 1)),
    "inline_cswin_s": cswin("small", (3, 6, 29, 2)),
    "inline_cswin_b": cswin("base", (3, 6, 29, 2)),
    "inline_cswin_b_384": cswin("base_384", (3, 6, 29, 2), "96-48-24-12", (1, 3, 384, 384)),
}
RECIPES["inline_pvt_mixed"] = replace(
    RECIPES["inline_pvt_t"],
    kwargs={"img_size": 64, "num_classes": 10, "attn_type": "SISI", "la_sr_ratios": "1111"},
    image=(2, 3, 64, 64),
)
