"""Heads that any backbone takes: on maps or tokens, without a backbone before them."""

from __future__ import annotations

from argparse import Namespace

from torch import nn

from recipes import Recipe, Source

EP = Source("https://github.com/billpsomas/efficient-probing", "b8f4fb84e8127d41aaad997d35b98c2f43f33125", "Apache-2.0")
OTHER_POOLINGS = (
    *("abmilp", "aim", "cae_att", "cbam", "clip.attention_pool", "clip.attention_pool2d", "coca_pytorch", "dolg.dolg"),
    *("jepa.attentive_pooler", "other_pool", "simpool"),
)


def probe(module, dim, **kwargs):
    """Build the head that the authors put onto an encoder."""
    model = nn.Module()
    model.head = nn.Linear(dim, kwargs["nb_classes"])
    module.build_probe_head(model, Namespace(cls_features="ep", **kwargs))
    return model.head


def pooling(**kwargs):
    """Return the recipe of the pooling alone, which gives [B, C / d_out]."""
    image = (2, 15, kwargs["dim"])
    return Recipe(EP, "poolings/ep.py", "EfficientProbing", kwargs, image=image, run=lambda m, x: {"out": m(x)})


RECIPES = {
    "ep": pooling(dim=24, num_queries=6),
    "ep_bias": pooling(dim=24, num_queries=4, d_out=2, qkv_bias=True),
    "ep_narrow": pooling(dim=24, num_queries=1, d_out=4),
    "ep_probe": Recipe(
        EP,
        "probe_heads.py",
        probe,
        {"dim": 24, "ep_queries": 3, "d_out": 2, "nb_classes": 5},
        image=(2, 15, 24),
        stand_ins={f"poolings.{name}": {} for name in OTHER_POOLINGS},
    ),
}
