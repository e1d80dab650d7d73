"""NiNformer: A Network in Network Transformer with Token Mixing as a Gating Function Generator.

Neural Computing and Applications 2025, https://arxiv.org/abs/2403.02411. Facts from
https://github.com/Abdullah-88/NiNformer at 0ec85d4 (BSD-3-Clause); the code here is our own. As released: in the place
of attention each token's projection is multiplied by what an MLP-Mixer block makes of the map; one norm serves both
branches of a block; there are no positions, no class token and no norm at the end.

The MLPs over the tokens have a weight for each token, so a model takes images of one size, that of `img_size`, and
refuses others; it may be any size and shape, padded to whole patches. With other `mixers` in all blocks any image is
taken. One size is published, trained at 32 px on MNIST, CIFAR-10 and CIFAR-100; the repository gives no accuracies.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import Mlp, to_2tuple
from torch import Tensor, nn

from visionzoo.layers.mixers import build_mixer
from visionzoo.layers.mixers.base import Mixer
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.tokens import OneNormTokenBlock, map_size
from visionzoo.models._isotropic import Isotropic, build_blocks
from visionzoo.models._registry import Published, Variant, register_family


class MixerGate(Mixer):
    """A projection of each token times what an MLP-Mixer block makes of the map; O(N²·C), norms float32 at least.

    Args:
        dim: channels C.
        map_size: height and width of the maps.
        hidden_dim: hidden width of both MLPs, over the tokens and over the channels.
        drop: dropout probability inside these MLPs.
    """

    def __init__(self, dim: int, map_size: tuple[int, int], hidden_dim: int, drop: float = 0.0):
        super().__init__(dim)
        self.map_size = map_size
        self.norm1 = LayerNorm(dim)
        self.token_mlp = Mlp(map_size[0] * map_size[1], hidden_dim, drop=drop)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_dim, drop=drop)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C].

        Raises:
            ValueError: if the map has another size than `map_size`.
        """
        self.check_input(x)
        if tuple(x.shape[1:3]) != self.map_size:
            height, width = self.map_size
            raise ValueError(
                f"MixerGate: its MLPs over the tokens are made for maps of {height} x {width} tokens, got "
                f"{x.shape[1]} x {x.shape[2]}; resize the images, or build the model for them with "
                f"img_size=(height, width) in pixels"
            )
        gate = x + self.token_mlp(self.norm1(x).flatten(1, 2).mT).mT.unflatten(1, self.map_size)
        gate = gate + self.mlp(self.norm2(gate))
        return self.proj(x) * gate


class NiNformer(Isotropic):
    """NiNformer.

    Args:
        depth: blocks.
        embed_dim: channels.
        mlp_ratio: hidden width of all MLPs over the channels.
        mlp_drop: dropout probability inside all MLPs.
        patch_size: side of the patches in pixels.
        img_size: size in pixels, or (height, width), of the images that the model is for.
        mixers: token mixers in place of some gates, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^patcher\.", "stem.conv."),
            (r"^model\.(\d+)\.norm\.", r"blocks.\1.norm2."),
            (r"^model\.(\d+)\.mgu\.(Mixer\.)?", r"blocks.\1.mixer."),
            (r"\.token_mix\.0\.", ".norm1."),
            (r"\.token_mix\.2\.", ".token_mlp."),
            (r"\.channel_mix\.0\.", ".norm2."),
            (r"\.channel_mix\.1\.", ".mlp."),
            (r"^model\.(\d+)\.ffn\.", r"blocks.\1.mlp."),
            (r"\.net\.0\.", ".fc1."),
            (r"\.net\.3\.", ".fc2."),
            (r"^classifier\.", "head.fc."),
        ],
    }

    def __init__(
        self,
        *,
        depth: int = 4,
        embed_dim: int = 256,
        mlp_ratio: float = 2.0,
        mlp_drop: float = 0.0,
        patch_size: int = 4,
        img_size: int | tuple[int, int] = 32,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        self_gated = {"type": "mixer_gate"}

        def build(spec: Any, dim: int, num_heads: int | None) -> Mixer | None:
            if spec == self_gated:
                return MixerGate(dim, map_size(img_size, patch_size), int(dim * mlp_ratio), mlp_drop)
            return build_mixer(spec, dim, num_heads)

        super().__init__(
            blocks=build_blocks(
                embed_dim,
                None,
                [self_gated] * depth,
                mixers,
                block=partial(OneNormTokenBlock, mlp_ratio=mlp_ratio, mlp_drop=mlp_drop),
                build=build,
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            patch_size=patch_size,
            class_token=False,
            positions="none",
            in_chans=in_chans,
            **head,
        )
        self.img_size = to_2tuple(img_size)
        self.ANY_SIZE = self.DYNAMIC_SIZE = not any(isinstance(module, MixerGate) for module in self.modules())

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Check that the model takes images of this size.

        Raises:
            ValueError: if it is for images of another.
        """
        own, asked = (map_size(size, self.patch_size) for size in (self.img_size, img_size))
        if not self.ANY_SIZE and own != asked:
            raise ValueError(
                f"NiNformer: its MLPs over the tokens are made for images of {self.img_size[0]} x {self.img_size[1]} "
                f"pixels and cannot be resized; build the model with img_size={img_size!r}, and train it"
            )


VARIANTS = {
    "zoo_ninformer_cifar": Variant(
        {},
        Published(size=32),
        {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        no_weights="none were published",
    )
}

TINY = {"zoo_ninformer_cifar": {"depth": 2, "embed_dim": 16, "patch_size": 8, "img_size": 64}}

register_family(
    __name__,
    NiNformer,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    pool_size=None,
    paper_ids="arXiv:2403.02411",
    origin_url="https://github.com/Abdullah-88/NiNformer",
    license="bsd-3-clause",
)
