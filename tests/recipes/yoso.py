"""YOSO in expectation over its hash functions, of 9 tokens of 12 channels, with the projections around it."""

import torch
from torch import nn

from . import Recipe, Source
from .gates import gradients

YOSO = Source("https://github.com/mlpen/YOSO", "6000487d9cd8e34519aa47650011f458ca0db64c", "none given")


class Around(nn.Module):
    """Projections around the attention of three heads, as the authors' `Attention` has them, on [B, N, C]."""

    def __init__(self, attention):
        super().__init__()
        self.W_q, self.W_k, self.W_v, self.ff = (nn.Linear(12, 12) for _ in range(4))
        self.attention = attention

    def forward(self, x):
        """Attend."""
        q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (self.W_q, self.W_k, self.W_v))
        return self.ff(self.attention(q, k, v, torch.ones(x.shape[:2])).transpose(1, 2).flatten(2))


def layer(module, **config):
    """Build the attention."""
    return Around(module.YOSOAttention(config))


RECIPES = {
    "yoso_e": Recipe(
        YOSO,
        "encoders/backbones/efficient_attentions/yoso/yoso_v2/yoso.py",
        layer,
        {"hashcode_len": 9, "num_hash_f": -1, "num_head": 3},
        image=(2, 9, 12),
        run=gradients,
        gradients=True,
        notes="the projections around the attention are the recipe's",
    )
}
