"""SEA's attention without causal mask, of 9 tokens of 12 channels; the model around it is a language model.

The code knows float32 and half precision only: here it takes float64 for float32, in names and casts. A teacher's
attention, without which it does not scale its scores, is its own, so that of the loss the estimate's part remains. What
it changes in place, though gradients need it, is a copy.
"""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

from . import Recipe, Source, beside
from .gates import gradients

SEA = Source("https://github.com/gmlwns2000/sea-attention", "5609413b14f480d741cf1edde49691576fc92b50", "none given")
OPS = "src.models.perlin_attention.ops"


class Wide:
    """torch, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def softmax(*args, **kwargs):
        """Return a copy, which the code changes in place."""
        return torch.softmax(*args, **kwargs).clone()

    @staticmethod
    def autocast(*args):
        """Leave dtypes as they are."""
        return nullcontext()


class Bench:
    """Measures nothing."""

    def region(self, name):
        """Time nothing."""
        return nullcontext()

    mem_region = region

    def register_temp_buffer(self, *args, **kwargs):
        """Keep nothing."""


class Around(nn.Module):
    """Projections around the attention, on [B, N, C]."""

    def __init__(self, attention):
        super().__init__()
        self.qkv, self.attention, self.proj = nn.Linear(12, 36), attention, nn.Linear(12, 12)

    def forward(self, x):
        """Attend."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        mask = x.new_zeros(len(x), 1, 1, x.shape[1])
        truth = (q @ k.mT / 6**0.5).detach()
        with patch.object(torch.Tensor, "float", torch.Tensor.double):
            out = self.attention(q, k, v, q, k, v, q, k, mask, truth, None)
        self.loss = out.loss
        return self.proj(out.context_layer)


def layer(module, **kwargs):
    """Build the attention, without the parameters of its other forms."""
    sys.modules[OPS].resize_from_m_to_t = beside(module, "ops/kernels/resize_m_to_t.py").resize_from_m_to_t
    module.torch = Wide()
    options = module.PerlinAttentionConfig(attention_predictor_length=4, **kwargs)
    attention = module.PerlinAttention(SimpleNamespace(num_attention_heads=2, hidden_size=12), options)
    unused = (
        "attention_predictor_enc" if options.attention_predictor_enc_per_layer else "attention_predictor_enc_per_layer"
    )
    for name in (
        "norm",
        "norm_performer",
        "norm_partial",
        "norm_random",
        "v_eye_learned",
        "v_eye_learned_causal",
        unused,
    ):
        delattr(attention, name)
    return Around(attention)


def run(model, x):
    """Return output and gradients, and the loss."""
    arrays = gradients(model, x)
    return {**arrays, "loss": model.loss}


def recipe(**kwargs):
    """Return the recipe of an attention."""
    return Recipe(
        SEA,
        "src/models/perlin_attention/attention.py",
        layer,
        kwargs,
        image=(2, 9, 12),
        constants=("instance.projection_matrix", "calls_since_last_redraw", "enc_head_embd"),
        filled=("projection_matrix",),
        run=run,
        gradients=True,
        stand_ins={
            "src.utils": {"get_bench": Bench, "Metric": object, "batch_to": lambda value, dtype: value.to(dtype)},
            "src.models.hf_bert": {},
            "src.models.common.lora": {},
            "src.models.perlin_attention.masked_mm": {},
            OPS: {},
        },
        notes="float64 in place of float32; a softmax is copied before it is changed in place; a teacher's scores are "
        "its own; projections around the attention are the recipe's",
    )


RECIPES = {
    "sea_heads": recipe(k=3, k_flatten_dim="causal_batch"),
    "sea_query": recipe(k=3, k_flatten_dim="query"),
    "sea_queries": recipe(k=4, k_flatten_dim="head", partial_attention_scaler=False),
    "sea_sample": recipe(k=4, k_flatten_dim="batch", attention_predictor_enc_per_layer=True),
}
