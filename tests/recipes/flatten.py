"""FLatten: focused linear attention in four hosts, with the arguments of the repository's cfgs/*.yaml."""

from . import Recipe, Source

FLATTEN = Source(
    "https://github.com/LeapLabTHU/FLatten-Transformer",
    "abdb115f5406c0e1b6864aad7fe998a3f424ae76",
    "none given by the repository",
)

RECIPES = {
    "flatten_cswin_t": Recipe(
        FLATTEN,
        "models/flatten_cswin.py",
        "FLatten_CSWin_64_24181_tiny_224",
        {"la_split_size": "56-28-14-7", "attn_type": "LLSS"},
    ),
    "flatten_cswin_mixed": Recipe(
        FLATTEN,
        "models/flatten_cswin.py",
        "CSWinTransformer",
        {
            "patch_size": 4,
            "embed_dim": 16,
            "depth": [1, 1, 3, 1],
            "split_size": [1, 2, 7, 7],
            "num_classes": 10,
            "la_split_size": "56-28-14-7",
            "attn_type": "SLMS2",
        },
        image=(1, 3, 224, 224),
    ),
    "flatten_pvt_mixed": Recipe(
        FLATTEN,
        "models/flatten_pvt.py",
        "flatten_pvt_tiny",
        {"img_size": 64, "num_classes": 10, "la_sr_ratios": "2111", "attn_type": "LSLS"},
        image=(2, 3, 64, 64),
    ),
    "flatten_pvt_t": Recipe(
        FLATTEN, "models/flatten_pvt.py", "flatten_pvt_tiny", {"la_sr_ratios": "1111", "attn_type": "LLLL"}
    ),
    "flatten_pvtv2_b0": Recipe(
        FLATTEN, "models/flatten_pvt_v2.py", "flatten_pvt_v2_b0", {"la_sr_ratios": "1111", "attn_type": "LLLL"}
    ),
    "flatten_swin_t": Recipe(
        FLATTEN,
        "models/flatten_swin.py",
        "FLattenSwinTransformer",
        {"window_size": 56, "attn_type": "LLSS"},
        constants=("relative_position_index", "attn_mask"),
    ),
}
