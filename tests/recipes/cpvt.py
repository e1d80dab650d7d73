"""PCPVT, which is in the repository of Twins; and CPVT, of which the authors released the position encoding only.

`cpvt_*_reconstruction` put the paper's network together from that encoding (PosCNN) and timm's blocks with DeiT's
arguments: a check of arithmetic, not the authors' model.
"""

from functools import partial

from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn

from . import Recipe, Source, stages, tokens

TWINS = Source("https://github.com/Meituan-AutoML/Twins", "c1ff6714969ad8ef330e75cf97bd310f7488f529", "Apache-2.0")


class Reconstruction(nn.Module):
    """CPVT with global average pooling: the encoding follows the first block."""

    def __init__(self, pos_block, dim, num_heads):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(224, 16, 3, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, 4, qkv_bias=True, norm_layer=norm) for _ in range(12))
        self.pos_block = pos_block
        self.norm = norm(dim)
        self.head = nn.Linear(dim, 1000)

    def forward(self, image):
        x = self.patch_embed(image)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 0:
                x = self.pos_block(x, 14, 14)
        return self.head(self.norm(x).mean(1))


def reconstruct(module, dim, num_heads):
    """Build the network around the authors' PosCNN."""
    return Reconstruction(module.PosCNN(dim, dim), dim, num_heads)


def pcpvt(size, *depths):
    """Return the recipe of a PCPVT."""
    return Recipe(TWINS, "gvt.py", f"pcpvt_{size}_v0", features=stages("blocks.{}.{last}", depths), layout=tokens)


def cpvt(dim, num_heads):
    """Return the recipe of a reconstruction."""
    return Recipe(
        TWINS,
        "gvt.py",
        reconstruct,
        {"dim": dim, "num_heads": num_heads},
        features=("blocks.0", "blocks.5", "blocks.11"),
        layout=tokens,
        notes="of the authors' code PosCNN alone runs: the rest of CPVT was never released",
    )


RECIPES = {
    "pcpvt_small_v0": pcpvt("small", 3, 4, 6, 3),
    "pcpvt_base_v0": pcpvt("base", 3, 4, 18, 3),
    "pcpvt_large_v0": pcpvt("large", 3, 8, 27, 3),
    "cpvt_tiny_gap_reconstruction": cpvt(192, 3),
    "cpvt_small_gap_reconstruction": cpvt(384, 6),
    "cpvt_base_gap_reconstruction": cpvt(768, 12),
}
