"""Heads that any backbone takes: on maps or tokens, without a backbone before them."""

from __future__ import annotations

import sys
from argparse import Namespace
from unittest.mock import patch

import torch
from torch import nn

from recipes import Recipe, Source

EP = Source("https://github.com/billpsomas/efficient-probing", "b8f4fb84e8127d41aaad997d35b98c2f43f33125", "Apache-2.0")
INTR = Source("https://github.com/Imageomics/INTR", "69b8a693d774b4805efe1adc1d0c4c4a28200568", "Apache-2.0")
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


class Backbone(nn.Module):
    """Passes a map on as the last of a backbone's, with its positions, and no pixel padded."""

    def __init__(self, channels, positions):
        super().__init__()
        self.num_channels, self.positions = channels, positions

    def forward(self, samples):
        return [samples], [self.positions(samples)]


def intr(module, channels, num_queries, pre_norm=False, position_embedding="sine", **kwargs):
    """Build INTR on a backbone that passes its input on."""
    args = Namespace(pre_norm=pre_norm, position_embedding=position_embedding, dropout=0.1, **kwargs)
    backbone = Backbone(channels, sys.modules["models.backbone"].build_position_encoding(args))
    return module.INTR(args, backbone, module.build_transformer(args), num_queries)


def looked(model, image):
    """Return logits, the encoder's output and the attention of all layers and heads."""
    nested = sys.modules["util.misc"].NestedTensor
    samples = nested(image, torch.zeros(image[:, 0].shape, dtype=torch.bool))
    with patch.object(torch, "float32", torch.float64):  # in which positions are computed
        out, encoded, _, attention, _ = model(samples)
    return {"logits": out["query_logits"], "encoded": encoded, "attention": attention}


def class_queries(**kwargs):
    """Return the recipe of a small INTR on a map."""
    sizes = {"channels": 12, "hidden_dim": 16, "nheads": 2, "dim_feedforward": 24, "num_queries": 5}
    sizes |= {"enc_layers": 2, "dec_layers": 2, **kwargs}
    return Recipe(INTR, "models/intr.py", intr, sizes, image=(2, 12, 3, 5), run=looked)


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
    "intr": class_queries(),
    "intr_learned": class_queries(position_embedding="learned", nheads=4, dec_layers=1),
    "intr_pre_norm": class_queries(pre_norm=True, enc_layers=1),
}
