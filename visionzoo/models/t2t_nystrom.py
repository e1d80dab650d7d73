"""T2T-ViT with Nyström attention: Nyströmformer, AAAI 2021, https://arxiv.org/abs/2102.03902.

Facts from ImageNet/T2T-ViT of https://github.com/mlpen/Nystromformer at 5689313 (Apache-2.0) and from T2T-ViT
(https://arxiv.org/abs/2101.11986), https://github.com/yitu-opensource/T2T-ViT at 0f63dc9 (Clear BSD); the code here is
our own. Tokens become tokens twice: each of 3×3 neighbors' tokens, joined, goes through one head of attention by 64
landmarks and an MLP, with no residual around attention but the values'. The blocks after that attend to all tokens.
`num_landmarks=0` is T2T-ViT_t, whose weights fit. Positions are sinusoids of the place in the row of tokens and do
not learn. The repository gives no numbers of these networks.

Where we differ: images of any size and shape are taken, padded with zeros to 16 pixels, with positions interpolated;
where there are fewer tokens than landmarks, each is one. Scores are scaled by the width of heads, as where the authors'
code builds a model without loading weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from visionzoo.layers.mixers.nystrom import NystromMixer
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_multiple
from visionzoo.layers.tokens import TokenBlock, TokenPositions, map_size
from visionzoo.layers.tracing import one_node
from visionzoo.models._isotropic import VIT_KEYS, Isotropic, build_blocks
from visionzoo.models._registry import Variant, register_family


class SinusoidPositions(TokenPositions):
    """Sines and cosines of each token's place in the row, prefix tokens first; a table that does not learn.

    Args:
        dim: channels C.
        size: height and width of the map that the table is made for.
        prefix: prefix tokens.
    """

    NO_WEIGHT_DECAY = ()

    def __init__(self, dim: int, size: tuple[int, int], *, prefix: int):
        super().__init__(dim, size, prefix=prefix)
        del self.table
        place = torch.arange(prefix + size[0] * size[1], dtype=torch.float64)[:, None]
        channel = torch.arange(dim)
        angle = place / 10000 ** (2 * (channel // 2).double() / dim)
        table = torch.where(channel % 2 == 0, angle.sin(), angle.cos())
        self.register_buffer("table", table.to(torch.get_default_dtype())[None])

    def set_size(self, size: tuple[int, int]) -> None:
        """Make the table one for maps of this size."""
        self.register_buffer("table", self.resized(size).clone())
        self.size = tuple(size)


class TokenMerge(nn.Module):
    """Patches of tokens, joined, with attention among them and an MLP: the step of tokens-to-token.

    Args:
        in_dim: channels before.
        dim: channels C after.
        kernel_size: side of the patches.
        stride: step between patches.
        padding: zeros around the map.
        num_landmarks: of the attention, see `NystromMixer`.
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int, padding: int, num_landmarks: int):
        super().__init__()
        self.window = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        joined = in_dim * kernel_size**2
        self.norm1 = LayerNorm(joined)
        self.mixer = NystromMixer(joined, 1, num_landmarks=num_landmarks, out_dim=dim, value_residual=True)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_dim, H, W] to [B, C, H', W']."""
        x = self.mixer(self.norm1(unfold(x, **self.window)))
        return (x + self.mlp(self.norm2(x))).permute(0, 3, 1, 2)


@one_node  # it looks at the size
def unfold(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """[B, C, H, W] to its patches [B, H', W', C·k²], channels first."""
    size = [(length + 2 * padding - kernel_size) // stride + 1 for length in x.shape[2:]]
    return F.unfold(x, kernel_size, padding=padding, stride=stride).mT.unflatten(1, size)


class TokensToToken(nn.Module):
    """Image to tokens of 16 pixels in three steps.

    Args:
        in_chans: image channels.
        dim: channels C.
        token_dim: channels in between.
        num_landmarks: of the attention, see `NystromMixer`.
    """

    def __init__(self, in_chans: int, dim: int, token_dim: int, num_landmarks: int):
        super().__init__()
        self.merge1 = TokenMerge(in_chans, token_dim, 7, 4, 2, num_landmarks)
        self.merge2 = TokenMerge(token_dim, token_dim, 3, 2, 1, num_landmarks)
        self.proj = nn.Linear(9 * token_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] to [B, C, ⌈H / 16⌉, ⌈W / 16⌉], a view of [B, H', W', C]."""
        x = pad_to_multiple(x.permute(0, 2, 3, 1), (16, 16)).permute(0, 3, 1, 2)
        x = self.merge2(self.merge1(x))
        return self.proj(unfold(x, 3, 2, 1)).permute(0, 3, 1, 2)


class T2TViT(Isotropic):
    """T2T-ViT with Nyström attention in its tokens-to-token stem.

    Args:
        depth: blocks.
        embed_dim: channels.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the blocks' projections to q, k, v have a bias.
        token_dim: channels in the stem.
        num_landmarks: of the stem's attention; 0 for attention of all to all.
        img_size: image size in pixels, or (height, width), for which the table of positions is made.
        class_token: have a class token.
        reg_tokens: number of register tokens beside it.
        mixers: other token mixers for some blocks, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^tokens_to_token\.attention(\d)\.", r"stem.merge\1."),
            (r"^tokens_to_token\.project\.", "stem.proj."),
            *VIT_KEYS,
        ],
    }

    def __init__(
        self,
        *,
        depth: int = 14,
        embed_dim: int = 384,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        token_dim: int = 64,
        num_landmarks: int = 64,
        img_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        reg_tokens: int = 0,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        super().__init__(
            blocks=build_blocks(
                embed_dim,
                num_heads,
                [{"type": "full", "qkv_bias": qkv_bias}] * depth,
                mixers,
                block=partial(TokenBlock, mlp_ratio=mlp_ratio),
                drop_path_rate=drop_path_rate,
            ),
            embed_dim=embed_dim,
            img_size=img_size,
            stem=TokensToToken(in_chans, embed_dim, token_dim, num_landmarks),
            class_token=class_token,
            reg_tokens=reg_tokens,
            norm=LayerNorm(embed_dim),
            in_chans=in_chans,
            **head,
        )
        self.positions = SinusoidPositions(embed_dim, map_size(img_size, 16), prefix=self.num_prefix_tokens)


_NO_WEIGHTS = "none were published; those of T2T-ViT_t fit (https://github.com/yitu-opensource/T2T-ViT)"
_SIZES: dict[str, dict[str, Any]] = {
    "7": {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0},
    "10": {"embed_dim": 256, "depth": 10, "num_heads": 4, "mlp_ratio": 2.0},
    "12": {"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0},
    "14": {},
    "19": {"embed_dim": 448, "depth": 19, "num_heads": 7},
    "24": {"embed_dim": 512, "depth": 24, "num_heads": 8},
    "14_resnext": {"num_heads": 32},
    "14_wide": {"embed_dim": 768, "depth": 4, "num_heads": 12},
}

VARIANTS = {f"zoo_t2t_nystrom_{size}": Variant(kwargs, no_weights=_NO_WEIGHTS) for size, kwargs in _SIZES.items()}

TINY = {"zoo_t2t_nystrom_7": {"embed_dim": 16, "depth": 2, "num_heads": 2, "token_dim": 8, "num_landmarks": 4}}

register_family(
    __name__,
    T2TViT,
    VARIANTS,
    tiny=TINY,
    first_conv=(),
    pool_size=None,
    crop_pct=0.9,
    paper_ids=("arXiv:2102.03902", "arXiv:2101.11986"),
    origin_url="https://github.com/mlpen/Nystromformer",
    license="apache-2.0",
)
