"""Scores and normalizers in place of softmax, of 9 tokens of 12 channels in three heads."""

import math
from unittest.mock import patch

import torch
from torch import nn

from . import Projected, Recipe, Source, beside
from ._frameworks import graph_layer, keras_layer
from .gates import gradients

COG = Source("https://github.com/trestad/CogAttn", "efecf29e3e5a7a08b4c5b2b96afcbf9fac6900ef", "none given")
ENTMAX = Source("https://github.com/deep-spin/entmax", "c2bec6d5e7d649cba7766c2172d89123ec2a6d70", "MIT")
MTA = Source("https://github.com/facebookresearch/RAM", "e6f051fbcfaef4cab69bf2ea1b25f500f94c0c64", "MIT")
NEURAL = Source(
    "https://github.com/awayfromzel/neural-attention-research", "f6572f573ec43ddf26b01d468557b1b6e5649cb7", "MIT"
)
NORMALIZED = Source(
    "https://github.com/OliverRichter/normalized-attention", "0ea196dad2a660521aba3b37f0a2bb946a6d3cb2", "none given"
)
PROBABILISTIC = Source(
    "https://github.com/apple/ml-probabilistic-attention",
    "2945e0611814c2c7677badc2c2b8315d34204b27",
    "Apple sample code",
)
RELA = Source("https://github.com/bzhangGo/zero", "d97e2c21b1c6d0467fe821223042247bf2b46bf9", "BSD-3-Clause")
SELECTIVE = Source(
    "https://github.com/umich-sota/selective_attention", "4ea65202c4cc0d7e4d0f621d5f1722d3770cd275", "Apache-2.0"
)
SIGMOID = Source(
    "https://github.com/apple/ml-sigmoid-attention", "9273b493f234ccbb184cab1131010dd0e965d8ce", "Apple sample code"
)
URPE = Source("https://github.com/lsj2408/URPE", "47b711f85be5de010deeafa9d8788d399912c3a2", "MIT")


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


class MultiToken(nn.Module):
    """Multi-token attention whose queries see all keys, with softmax and norm in float64 and on the CPU."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        layer.normalize_attention = lambda att_type: lambda scores: scores.softmax(-1).clone()

    def forward(self, x):
        """Attend."""
        mask = x.new_zeros(1, 1, x.shape[1], x.shape[1])
        with on_cpu(), patch.object(torch.Tensor, "float", lambda value: value):
            return self.layer(x, x, mask=mask)


def on_cpu():
    """Make tensors on the CPU that the code asks for on a GPU."""
    made = torch.tensor
    return patch.object(torch, "tensor", lambda value, **_: made(value))


def multi_token(module, **kwargs):
    """Build the attention of four heads."""
    options = module.MTATransformerArgs(use_mta=True, **kwargs)
    with on_cpu():
        return MultiToken(module.Attention(12, 3, 4, 4, 1e4, False, 9, options, dropout=0.0, layer_id=0))


def mta(**kwargs):
    """Return the recipe of multi-token attention."""
    lingua = {"apply_rotary_emb": lambda q, k, *_: (q, k), "repeat_kv": lambda x, *_, **__: x}
    return recipe(
        MTA, "projects/mta/mta_transformer.py", multi_token, "no rotary positions, no mask, softmax in float64",
        stand_ins={"lingua.transformer": lingua, "xformers.ops": {}}, **kwargs,
    )  # fmt: skip


def selective(module):
    """Build attention with the temperature of positions, where every query sees all 9 keys."""
    layer = module.CausalSelfAttention(module.GPTConfig(block_size=9, n_head=3, n_embd=12))
    layer.mask_cache = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    layer.row_length_buffer = torch.full((1, 1, 9, 1), 9.0, dtype=torch.float64)
    return layer


def normalized(module):
    """Build the attention of normalized scores, with a layer norm and GELU behind it."""
    module.tf.keras.backend.set_floatx("float64")
    weights, norm = module.NormalizeAttention(), module.LayerNormalization()
    layer = module.AttentionLayer(
        3, 12, logit_rescale=False, attention_non_linearity=weights, attention_dropout_probability=0,
        hidden_normalization=norm, hidden_non_linearity=module.GeluLayer(),
    )  # fmt: skip
    mask = module.tf.ones((1, 1, 1, 9), "float64")

    def variables():
        parts = [f"{name}_{kind}" for name in ("key", "query", "value", "mix") for kind in ("w", "b")]
        own = {name: getattr(layer, name) for name in parts}
        return own | {"gain": weights._gain, "bias": weights._bias, "norm_weight": norm.gamma, "norm_bias": norm.beta}

    return keras_layer(lambda x: layer((x, mask)), variables, (2, 9, 12))


def rectified(module):
    """Build ReLA in a graph of TensorFlow 1."""
    for part in (module, module.func, module.util, module.dtype):
        part.tf = module.tf.compat.v1
    module.dtype.set_floatx("float64")
    return graph_layer(lambda x: module.dot_attention(x, None, None, 12, num_heads=3)["output"], (2, 9, 12))


class Universal(nn.Module):
    """URPE's attention with numbers for each offset, as the file of the encoder makes them from its tables."""

    def __init__(self, layer, bias):
        super().__init__()
        self.layer, self.ur_rp_bias = layer, nn.Embedding(17, 3)
        self.rp_bias = nn.Embedding(17, 3) if bias else None

    def forward(self, x):
        """Attend."""
        places = torch.arange(9)
        offsets, x = places - places[:, None] + 8, x.transpose(0, 1)
        bias, factor = (
            None if table is None else table(offsets).permute(2, 0, 1).repeat(x.shape[1], 1, 1)
            for table in (self.rp_bias, self.ur_rp_bias)
        )
        out, _ = self.layer(x, x, x, need_weights=False, rel_pos_bias=bias, ur_rel_pos_bias=factor)
        return out.transpose(0, 1)


def universal(module, bias):
    """Build URPE's attention."""
    return Universal(module.MultiheadAttention(12, 3, self_attention=True), bias)


def urpe(bias):
    """Return the recipe of attention with a factor for each offset, and a bias for each."""
    fairseq = {
        "fairseq.utils": {"softmax": lambda scores, dim, onnx_trace: scores.softmax(dim)},
        "fairseq.incremental_decoding_utils": {},
        "fairseq.modules.fairseq_dropout": {"FairseqDropout": lambda *_, **__: nn.Identity()},
        "fairseq.modules.quant_noise": {"quant_noise": lambda layer, *_: layer},
    }
    return recipe(
        URPE, "fairseq/modules/multihead_attention.py",
        universal,
        "tables of one entry for each offset, read as in transformer_sentence_encoder.py", stand_ins=fairseq, bias=bias,
    )  # fmt: skip


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
    "mta": mta(query_kernel_size=3, key_kernel_size=5, head_kernel_size=2),
    "mta_weights": mta(
        query_kernel_size=3, key_kernel_size=3, after_sm_query_kernel_size=2, after_sm_key_kernel_size=3,
        pad_key="left", pre_sm_linear_head=True,
    ),
    "mta_norm": mta(
        query_kernel_size=2, key_kernel_size=4, head_kernel_size=4, pad_key="right", group_norm=True, add_gating=True,
    ),
    "neural": recipe(
        NEURAL, "vision_neural_attention/Models/NeuralAttention.py", "NeuralAttention",
        dim=12, heads=3, causal=False, projection_dim=4,
    ),
    "normalized": recipe(NORMALIZED, "models.py", normalized, "run by TensorFlow in float64, with a mask of ones"),
    "rela": recipe(RELA, "modules/rela.py", rectified, "run by TensorFlow's interface of version 1, in float64"),
    "selective": recipe(
        SELECTIVE, "lit_gpt/gpt_2_PTS.py", selective, "every query sees all keys, and its row is as long as they are"
    ),
    "urpe": urpe(bias=False),
    "urpe_bias": urpe(bias=True),
}  # fmt: skip
