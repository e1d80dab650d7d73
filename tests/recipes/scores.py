"""Scores and normalizers in place of softmax, of 9 tokens of 12 channels in three heads."""

import math

import torch
from torch import nn

from . import Projected, Recipe, Source, beside
from .gates import gradients

COG = Source("https://github.com/trestad/CogAttn", "efecf29e3e5a7a08b4c5b2b96afcbf9fac6900ef", "none given")
ENTMAX = Source("https://github.com/deep-spin/entmax", "c2bec6d5e7d649cba7766c2172d89123ec2a6d70", "MIT")
NEURAL = Source(
    "https://github.com/awayfromzel/neural-attention-research", "f6572f573ec43ddf26b01d468557b1b6e5649cb7", "MIT"
)
PROBABILISTIC = Source(
    "https://github.com/apple/ml-probabilistic-attention",
    "2945e0611814c2c7677badc2c2b8315d34204b27",
    "Apple sample code",
)
SIGMOID = Source(
    "https://github.com/apple/ml-sigmoid-attention", "9273b493f234ccbb184cab1131010dd0e965d8ce", "Apple sample code"
)


def recipe(source, file, factory, notes="", **options):
    """Return the recipe of a layer."""
    stand_ins = options.pop("stand_ins", {})
    common = {"image": (2, 9, 12), "run": gradients, "gradients": True, "constants": ("attn_bias", "attn_temp")}
    return Recipe(source, file, factory, options, stand_ins=stand_ins, notes=notes, **common)


class FinalOutput(nn.Module):
    """A layer of several outputs, of which the last counts."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        """Return it."""
        return self.layer(x)["attn_proj"]


def sigmoid(module, qk_norm):
    """Build sigmoid attention for 9 tokens, whose bias is not rounded to float32."""
    layer = module.Attention(12, torch.sigmoid, num_heads=3, bias=True, qk_norm=qk_norm)
    layer.attn_bias = torch.tensor([-math.log(9)], dtype=torch.float64)
    return FinalOutput(layer)


def apple(qk_norm):
    """Return the recipe of sigmoid attention."""
    names = {"attention_simulator.layers.position_embedding": {"alibi": None, "apply_rotary_emb": None}}
    path = "attention_simulator/src/attention_simulator/layers/attention.py"
    return recipe(SIGMOID, path, sigmoid, stand_ins=names, qk_norm=qk_norm)


class Entmax(nn.Module):
    """Attention whose weights are a function of the scaled scores, and of a power that each head learns."""

    def __init__(self, function, learned):
        super().__init__()
        self.function = function
        self.sharpness = nn.Parameter(torch.zeros(3)) if learned else None

    def forward(self, q, k, v):
        """Attend."""
        scores = q @ k.mT / 2
        if self.sharpness is None:
            return self.function(scores, -1) @ v
        return self.function(scores, 1 + self.sharpness.sigmoid()[:, None, None], n_iter=100) @ v


def entmax(module, function):
    """Build attention around a function of the package."""
    learned = function == "entmax_bisect"
    return Projected(Entmax(getattr(beside(module, "root_finding.py") if learned else module, function), learned))


class Gaussian(nn.Module):
    """Probabilistic attention of one precision, of q, k and v [B, G, N, D]."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, q, k, v):
        """Attend."""
        return self.attention(*(t.mT for t in (q, k)), 0.5, v.mT, 0.0).mT


def probabilistic(module, steps):
    """Build probabilistic attention."""
    options = {"key_adaptation": steps > 0, "key_adaptation_iters": steps}
    return Projected(Gaussian(module.ProbabilisticAttention(True, True, **options)))


def gaussian(steps):
    """Return the recipe of probabilistic attention."""
    notes = "the projections around the attention are the recipe's"
    return recipe(PROBABILISTIC, "probabilisticattention.py", probabilistic, notes, steps=steps)


def sparse(function):
    """Return the recipe of attention with a function of the package."""
    return recipe(
        ENTMAX, "entmax/activations.py", entmax, "the attention around the function is the recipe's", function=function
    )


RECIPES = {
    "sigmoid": apple(qk_norm=False),
    "sigmoid_qk_norm": apple(qk_norm=True),
    "cog": recipe(
        COG, "U-ViC/libs/uvit_t2i.py", "CogAttention", dim=12, num_heads=3, stand_ins={"U-ViC.libs.timm": {}}
    ),
    "sparsemax": sparse("sparsemax"),
    "entmax15": sparse("entmax15"),
    "entmax": sparse("entmax_bisect"),
    "gaussian": gaussian(steps=0),
    "gaussian_keys": gaussian(steps=2),
    "neural": recipe(
        NEURAL, "vision_neural_attention/Models/NeuralAttention.py", "NeuralAttention",
        dim=12, heads=3, causal=False, projection_dim=4,
    ),
}  # fmt: skip
