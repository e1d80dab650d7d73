"""LITv2: HiLo attention; the sizes are those of the repository's configs/*.yaml."""

from torchvision.ops import deform_conv2d

from . import Recipe, Source, drawn, stages, tokens

LITV2 = Source("https://github.com/ziplab/LITv2", "7501c8662991cad6db780b61fac0886b56a76588", "Apache-2.0")


def deform_conv2d_forward(x, weight, bias, offset, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, *options):
    """Run torchvision's operation in place of their compiled one; they use neither dilation nor groups."""
    assert options[:4] == (1, 1, 1, 1), options
    return deform_conv2d(x, offset, weight, bias, stride=(stride_h, stride_w), padding=(pad_h, pad_w))


def model(embed_dim, depths, num_heads, size=224, batch=2):
    """Return the recipe of a model."""
    return Recipe(
        LITV2,
        "models/litv2.py",
        "LITv2",
        {
            "img_size": size,
            "embed_dim": embed_dim,
            "depths": depths,
            "num_heads": num_heads,
            "alpha": 0.9,
            "local_ws": [0, 0, 2, 1],
        },
        root="classification",
        image=(batch, 3, size, size),
        features=stages("layers.{}.blocks.{last}", depths),
        layout=tokens,
        stand_ins={"apex": {}, "DCN": {"deform_conv2d_forward": deform_conv2d_forward}},
        notes="the compiled deformable convolution is replaced by torchvision's",
    )


RECIPES = {
    "litv2_s": model(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "litv2_m": model(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "litv2_b": model(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "litv2_b_384": model(128, (2, 2, 18, 2), (4, 8, 16, 32), size=384, batch=1),
    "hilo_384": Recipe(
        LITV2,
        "models/attentions.py",
        "HiLo",
        {"dim": 384, "num_heads": 12, "qkv_bias": True, "window_size": 2, "alpha": 0.9},
        root="classification",
        image=(2, 196, 384),
        run=lambda layer, image: {"out": layer(drawn(1, image.shape))},
    ),
}
