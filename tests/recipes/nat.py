"""NAT, DiNAT and DiNATs, whose attention is not in their repository but in NATTEN, an extension to be compiled.

The stand-ins for it here are written from the paper's definition: nothing is compiled. The first records of `na2d_*`
were outputs of the compiled CPU functions of NATTEN v0.14.6 (which has the bias that later versions lack), and the
stand-ins gave the same, to the digits of the float32 that those ran in.
"""

import torch
from torch import nn
from torch.nn import functional as F

from . import Recipe, Source, drawn, features_only, nhwc, stages

NAT = Source(
    "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer", "d334f5bb0bd73cad05e5aeaf7c14cce3876a9650", "MIT"
)
NATTEN = Source("https://github.com/SHI-Labs/NATTEN", "3b54c76185904f3cb59a49fff7bc044e4513d106", "MIT")
NOTES = "natten is replaced by a stand-in written from the definition"


def neighbors(length, kernel_size, dilation):
    """Return the places each place of an axis sees, and how far each is in steps of the dilation: both [length, K]."""
    seen = []
    for place in range(length):
        group = list(range(place % dilation, length, dilation))
        first = min(max(group.index(place) - kernel_size // 2, 0), len(group) - kernel_size)
        seen.append(group[first : first + kernel_size])
    places = torch.tensor(seen)
    return places, (places - torch.arange(length)[:, None]) // dilation


def seen(q, kernel_size, dilation):
    """Return rows and columns of the neighbors in a map [B, G, H, W, D], and their distances + K-1: [H, W, K·K]."""
    (rows, up), (columns, left) = (neighbors(length, kernel_size, dilation) for length in q.shape[2:4])
    shape = (*q.shape[2:4], kernel_size, kernel_size)
    across, along = (lambda t: t[:, None, :, None].expand(shape)), (lambda t: t[None, :, None, :].expand(shape))
    middle = kernel_size - 1
    return [t.flatten(2) for t in (across(rows), along(columns), across(up) + middle, along(left) + middle)]


def natten2dqkrpb(q, k, rpb, kernel_size, dilation):
    """Products of each query [B, G, H, W, D] with its neighbors' keys, plus the bias of their distances."""
    rows, columns, up, left = seen(q, kernel_size, dilation)
    products = torch.einsum("bghwd,bghwkd->bghwk", q, k[:, :, rows, columns])
    return products if rpb is None else products + rpb[:, up, left]


def natten2dav(weights, v, kernel_size, dilation):
    """Sums of each query's neighbors' values [B, G, H, W, D] by its weights [B, G, H, W, K·K]."""
    rows, columns, _, _ = seen(v, kernel_size, dilation)
    return torch.einsum("bghwk,bghwkd->bghwd", weights, v[:, :, rows, columns])


class NeighborhoodAttention2D(nn.Module):
    """natten's module: a map smaller than the window is filled up with zeros before q, k and v are made."""

    def __init__(self, dim, num_heads, kernel_size, dilation=1, qk_scale=None, qkv_bias=True, **options):
        super().__init__()
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation or 1
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        height, width = x.shape[1:3]
        window = self.kernel_size * self.dilation
        x = F.pad(x, (0, 0, 0, max(0, window - width), 0, max(0, window - height)))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        scores = natten2dqkrpb(q * self.scale, k, self.rpb, self.kernel_size, self.dilation)
        out = natten2dav(scores.softmax(-1), v, self.kernel_size, self.dilation)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(3)[:, :height, :width])


class Given(nn.Module):
    """In place of the layer that makes q, k and v [B, H, W, C]: drawn from seeds."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, x):
        shape = (*x.shape[:3], self.heads, x.shape[3] // self.heads)
        return torch.stack([drawn(seed, shape) for seed in (1, 2, 3)], 3).flatten(3)


def without_layers(module):
    """Leave of NATTEN's module what is between its two layers."""
    module.qkv, module.proj = Given(module.num_heads), nn.Identity()


def with_and_without_bias(module, image):
    """Return outputs [B, H, W, G, D]."""
    side = 2 * module.kernel_size - 1
    out = {}
    for key, rpb in (("out", None), ("out_rpb", nn.Parameter(drawn(4, (module.num_heads, side, side))))):
        module.rpb = rpb
        out[key] = module(image.flatten(3)).view(image.shape)
    return out


def operation(dilation):
    """Return the recipe of NATTEN's attention alone; the image gives its shape only."""
    return Recipe(
        NATTEN,
        "src/natten/natten2d.py",
        "NeighborhoodAttention2D",
        {"dim": 128, "num_heads": 4, "kernel_size": 7, "dilation": dilation, "bias": False},
        image=(2, 14, 18, 4, 32),
        run=with_and_without_bias,
        change=without_layers,
        stand_ins={"src.natten.functional": {"natten2dqkrpb": natten2dqkrpb, "natten2dav": natten2dav}},
        notes="the two compiled functions are replaced by stand-ins written from the definition",
    )


STAND_INS = {"natten": {"NeighborhoodAttention2D": NeighborhoodAttention2D}}
LEVELS = stages("levels.{}.blocks.{last}", (3, 4, 6, 5))
LAYERS = stages("layers.{}.blocks.{last}", (2, 2, 6, 2))


def model(file, factory, image, features):
    """Return the recipe of a model."""
    return Recipe(
        NAT,
        f"classification/{file}.py",
        factory,
        image=image,
        features=features,
        layout=nhwc,
        stand_ins=STAND_INS,
        notes=NOTES,
    )


def dense(file, factory, features):
    """Return the recipe of a backbone for detection, whose maps are kept before the norms of the outputs."""
    return Recipe(
        NAT,
        f"detection/{file}.py",
        factory,
        {
            "embed_dim": 8,
            "mlp_ratio": 2,
            "depths": (1, 2, 1, 1),
            "num_heads": (1, 2, 2, 4),
            "kernel_size": 3,
            "dilations": ((4,), (1, 3), (2,), (1,)),
        },
        image=(1, 3, 97, 130),
        features=features,
        layout=nhwc,
        run=features_only,
        stand_ins={**STAND_INS, "mmcv.runner": {}, "mmdet.utils": {}, "mmdet.models.builder": {}},
        notes=NOTES,
    )


def isotropic(factory, layer="NATransformerLayer", image=(2, 3, 64, 64), **kwargs):
    """Return the recipe of a small isotropic model, for square images."""

    def build(module, **kwargs):
        return module.NATIsotropic(layer=getattr(module, layer), **kwargs)

    build.__name__ = factory
    kwargs = {"img_size": image[2], "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 3, **kwargs}
    return Recipe(
        NAT,
        "classification/isotropic.py",
        build,
        {**kwargs, "mlp_ratio": 2.0, "num_classes": 10},
        image=image,
        features=("layers.0", "layers.1", "layers.2"),
        layout=nhwc,
        constants=("relative_position_index",),
        stand_ins=STAND_INS,
        notes=f"{NOTES}; small options of {factory}",
    )


RECIPES = {
    "dinat_isotropic": isotropic("dinat_isotropic_small", kernel_size=3, dilation=2),
    "vitrpb": isotropic("vitrpb_small", "VisionTransformerLayer", (1, 3, 48, 48), kernel_size=None, dilation=None),
    "nat_dense": dense("nat", "NAT", stages("levels.{}.blocks.{last}", (1, 2, 1, 1))),
    "dinats_dense": dense("dinats", "DiNAT_s", stages("layers.{}.blocks.{last}", (1, 2, 1, 1))),
    "nat_mini": model("nat", "nat_mini", (2, 3, 224, 224), LEVELS),
    "dinat_mini": model("dinat", "dinat_mini", (2, 3, 224, 224), LEVELS),
    "dinat_mini_padded": model("dinat", "dinat_mini", (1, 3, 150, 250), LEVELS),
    "dinats_tiny": model("dinats", "dinat_s_tiny", (2, 3, 230, 250), LAYERS),
    "na2d_k7": operation(dilation=1),
    "na2d_k7_d2": operation(dilation=2),
}
