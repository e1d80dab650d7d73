"""Routed and sparse attention, pooling, transforms, local kernels: 9 tokens of 12 channels, or maps of 12 channels."""

import inspect
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from . import Projected, Recipe, Source
from ._frameworks import graph_layer
from .gates import gradients

CLEAR = Source("https://github.com/Huage001/CLEAR", "98e9fed2b8a776a043a0421100db9831879de784", "Apache-2.0")
DLGSA = Source("https://github.com/NeonLeexiang/DLGSANet", "0974b9ae54f22d7f1641ba51ef9252dd3b5b08b3", "Apache-2.0")
DRS = Source("https://github.com/cschenxiang/DRSformer", "e77bbb4ecc59aaa2cd170a0f8f65b188a9dd77c6", "none given")
MOSA = Source("https://github.com/piotrpiekos/MoSA", "f6dc4bcd1a015f7d76c1b4609b8fe68589980fdb", "MIT")
PONET = Source("https://github.com/lxchtan/PoNet", "cc9a29a3c7732e8c5cdda7eae32e556a2fa71b1d", "Apache-2.0")
ROUTING = Source("https://github.com/lucidrains/routing-transformer", "3f6c461a036e98dbae7e70c623d1c0e0616ef82a", "MIT")
STRIDED = Source("https://github.com/openai/sparse_attention", "c53f3bdbf6225be0582f0357072e82b13c69be7d", "none given")
UTILS = "basicsr.archs.dlgsanet_idynamicdwconv_util"
OTHERS = {
    "local_attention": {},
    "product_key_memory": {},
    "mixture_of_experts": {},
    "routing_transformer.reversible": {},
}


class Routed(nn.Module):
    """Routing attention without its loss; keys that are queries are given as such."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, q, k, v):
        """Attend."""
        return self.attention(q, q if self.attention.shared_qk else k, v)[0]


def kmeans(module, shared_qk):
    """Build routing attention of clusters that stay."""
    attention = module.KmeansAttention(2, 4, 3, 4, shared_qk=shared_qk)
    attention.kmeans.initted.fill_(True)
    return Projected(Routed(attention))


class Pooling(nn.Module):
    """PoNet's attention with its projections, all in one."""

    def __init__(self, attention):
        super().__init__()
        self.in_proj, self.attention, self.proj = nn.Linear(12, 60), attention, nn.Linear(12, 12)

    def forward(self, x):
        """Pool."""
        *heads, local, segment = self.in_proj(x).chunk(5, -1)
        q, k, o = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in heads)
        return self.proj(self.attention(x, q, k, o, local, segment, None))


def ponet(module):
    """Build it for two segments."""
    return Pooling(module.PoNetAttention({"num_head": 3, "head_dim": 4, "segment_num": 2}))


def routing(shared_qk):
    """Return the recipe of routing attention."""
    return Recipe(
        ROUTING,
        "routing_transformer/routing_transformer.py",
        kmeans,
        {"shared_qk": shared_qk},
        image=(2, 9, 12),
        constants=("initted",),
        filled=("means",),
        run=gradients,
        gradients=True,
        stand_ins=OTHERS,
        notes="the projections around the attention are the recipe's; its loss is left out",
    )


def channels(source, file, factory, **kwargs):
    """Return the recipe of attention among channels of a map."""
    return Recipe(
        source,
        file,
        factory,
        {"dim": 12, "bias": False, **kwargs},
        image=(2, 12, 4, 5),
        run=gradients,
        gradients=True,
        stand_ins={"basicsr.utils.registry": {}, "basicsr.archs.arch_util": {}, UTILS: {}},
    )


def expert_choice(module, **kwargs):
    """Build MoSA without positions, and without a mask."""
    layer = module.PureMoSA(3, 2, 12, 4, **kwargs)
    del layer.pe
    layer.pe = lambda q, places, k, others: (q, k)
    attend = F.scaled_dot_product_attention
    module.F = SimpleNamespace(scaled_dot_product_attention=lambda q, k, v, attn_mask: attend(q, k, v))
    return layer


class Discs(nn.Module):
    """Projections around CLEAR's attention, on [B, 12, H, W]."""

    def __init__(self, processor):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.proj = (nn.Linear(12, 12) for _ in range(4))
        self.processor = processor

    def forward(self, x):
        """Attend."""
        attention = SimpleNamespace(to_q=self.to_q, to_k=self.to_k, to_v=self.to_v, heads=3, norm_q=None, norm_k=None)
        return self.proj(self.processor(attention, x.flatten(2).mT)).mT.unflatten(2, x.shape[2:])


def clear(module, cells):
    """Build it for maps of 4 x 4, with cells of 2 x 2 or without, by torch's attention with its mask."""
    places = torch.arange(48)
    module.create_block_mask = lambda rule, Q_LEN, KV_LEN, **_: rule(0, 0, places[:Q_LEN, None], places[:KV_LEN])
    if cells:
        module.init_local_downsample_mask_flex(4, 4, 0, 3, 2, "cpu")
        # 512 tokens of text come first in the file, here none
        exec(inspect.getsource(module.LocalDownsampleFlexAttnProcessor).replace("512:", "0:"), vars(module))
        processor = module.LocalDownsampleFlexAttnProcessor(2)
    else:
        module.init_local_mask_flex(4, 4, 0, 3, "cpu")
        processor = module.LocalFlexAttnProcessor()
    processor.flex_attn = partial(F.scaled_dot_product_attention, attn_mask=module.BLOCK_MASK)
    return Discs(processor)


def discs(cells):
    """Return the recipe of CLEAR's attention."""
    diffusers = {"diffusers.models.attention_processor": {}, "diffusers.models.embeddings": {}}
    return Recipe(
        CLEAR, "attention_processor.py", clear, {"cells": cells}, image=(2, 12, 4, 4), run=gradients, gradients=True,
        stand_ins=diffusers,
        notes="no text, rotary positions or norms; torch's attention with the file's mask in place of the compiled "
        "one; the projections are the recipe's",
    )  # fmt: skip


class Strided(nn.Module):
    """Projections around the sparse transformer's attention, on [B, 12, H, W]."""

    def __init__(self, attention):
        super().__init__()
        self.qkv, self.attention, self.proj = nn.Linear(12, 36), attention, nn.Linear(12, 12)

    def forward(self, x):
        """Attend."""
        return self.proj(self.attention(self.qkv(x.flatten(2).mT))).mT.unflatten(2, x.shape[2:])


def strided(module):
    """Build it for maps of 3 x 4, where every fourth token is one of the column."""
    first, before = module.tf.compat.v1, module.get_attn_mask
    module.tf = SimpleNamespace(**{name: getattr(first, name) for name in dir(first)})
    module.tf.to_float = first.to_double

    def both_ways(*args):
        mask = before(*args)
        return first.maximum(mask, first.transpose(mask, (0, 1, 3, 2)))

    module.get_attn_mask = both_ways
    return Strided(graph_layer(lambda x: module.attention_impl(*first.split(x, 3, -1), 3, "strided", 4), (2, 12, 36)))


def by_place(x, weight, stride, padding):
    """Convolve by weights of each place [B, G, h, w, H, W]: in place of a kernel for GPUs, by its rule."""
    windows = F.unfold(x, weight.shape[2:4], padding=padding).view(len(x), weight.shape[1], -1, 9, *x.shape[2:])
    return (windows * weight.flatten(2, 3).unsqueeze(2)).sum(3).flatten(1, 2)


def dynamic_local(module, **kwargs):
    """Build kernels of each place, 3 x 3, for groups of 4 channels."""
    block = module.IDynamicDWConvBlock(12, 3, heads=4, **kwargs)
    vars(inspect.getmodule(type(block.conv)))["_idynamic_cuda"] = by_place
    return block


class Unmasked(nn.Module):
    """A layer that takes a mask, without one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        """Mix."""
        return self.layer(x, None)


def fnet(module):
    """Build the transform."""
    return Unmasked(module.FFTAttention(None))


def of_each_place(**kwargs):
    """Return the recipe of kernels of each place."""
    return Recipe(
        DLGSA, "basicsr/archs/dlgsanet_arch.py", dynamic_local, kwargs, image=(2, 12, 4, 5), run=gradients,
        gradients=True,
        stand_ins={"basicsr.utils.registry": {}, "basicsr.archs.arch_util": {}, "cupy": {}},
        notes="the convolution, a CUDA kernel, is written by the rule of that kernel",
    )  # fmt: skip


def mosa(**kwargs):
    """Return the recipe of MoSA."""
    return Recipe(
        MOSA, "mosa/MoSA.py", expert_choice, kwargs, image=(2, 9, 12), run=gradients, gradients=True,
        notes="no rotary positions, no mask",
    )  # fmt: skip


RECIPES = {
    "clear": discs(cells=False),
    "clear_cells": discs(cells=True),
    "dynamic_local": of_each_place(),
    "dynamic_local_plain": of_each_place(bias=False),
    "expert_choice": mosa(),
    "expert_choice_first": mosa(include_first=1),
    "fnet": Recipe(
        PONET, "examples/LRA/code/attention_fnet.py", fnet, image=(2, 9, 12), run=gradients,
        gradients=True, notes="a copy of FNet, whose own code is in JAX",
    ),
    "kmeans": routing(shared_qk=False),
    "kmeans_shared": routing(shared_qk=True),
    "strided": Recipe(
        STRIDED, "attention.py", strided, image=(2, 12, 3, 4), run=gradients, gradients=True,
        stand_ins={"blocksparse": {}, "utils": {
            "shape_list": lambda x: x.shape.as_list(), "recomputable": lambda name: lambda function: function,
        }},
        notes="run by TensorFlow's interface of version 1, in float64; keys after the query are seen, too: the mask is "
        "joined with its transpose; the projections are the recipe's",
    ),
    "topk_channels": channels(DRS, "basicsr/models/archs/DRSformer_arch.py", "Attention", num_heads=2),
    "relu_channels": channels(
        DLGSA, "basicsr/archs/dlgsanet_arch.py", "SparseAttention", num_heads=3, tlc_flag=False
    ),
    "ponet": Recipe(
        PONET, "examples/LRA/code/attention_ponet.py", ponet, image=(2, 9, 12), run=gradients, gradients=True,
        notes="the projections around the attention are the recipe's",
    ),
}  # fmt: skip
