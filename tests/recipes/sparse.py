"""Routed and sparse attention, and pooling: 9 tokens of 12 channels, or maps of 12 channels that attend."""

from torch import nn

from . import Projected, Recipe, Source
from .gates import gradients

DLGSA = Source("https://github.com/NeonLeexiang/DLGSANet", "0974b9ae54f22d7f1641ba51ef9252dd3b5b08b3", "Apache-2.0")
DRS = Source("https://github.com/cschenxiang/DRSformer", "e77bbb4ecc59aaa2cd170a0f8f65b188a9dd77c6", "none given")
PONET = Source("https://github.com/lxchtan/PoNet", "cc9a29a3c7732e8c5cdda7eae32e556a2fa71b1d", "Apache-2.0")
ROUTING = Source("https://github.com/lucidrains/routing-transformer", "3f6c461a036e98dbae7e70c623d1c0e0616ef82a", "MIT")
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


RECIPES = {
    "kmeans": routing(shared_qk=False),
    "kmeans_shared": routing(shared_qk=True),
    "topk_channels": channels(DRS, "basicsr/models/archs/DRSformer_arch.py", "Attention", num_heads=2),
    "relu_channels": channels(
        DLGSA, "basicsr/archs/dlgsanet_arch.py", "SparseAttention", num_heads=3, tlc_flag=False
    ),
    "ponet": Recipe(
        PONET, "examples/LRA/code/attention_ponet.py", ponet, image=(2, 9, 12), run=gradients, gradients=True,
        notes="the projections around the attention are the recipe's",
    ),
}  # fmt: skip
