"""LITv2: Fast Vision Transformers with HiLo Attention, NeurIPS 2022, https://arxiv.org/abs/2205.13213.

Facts from https://github.com/ziplab/LITv2 at 7501c86 (Apache-2.0); the code here is our own. The first two stages have
no token mixing but the convolutions of their MLPs. Maps shrink by a deformable convolution, whose offsets are zero at
first, so that it starts as a plain one; the authors train the offsets with a hundredth of the learning rate, which
no recipe here does. Their classifier takes one image size; other sizes are treated as in their detection and
segmentation backbones, for which `window_sizes=(0, 0, 4, 1)` is the faster of two forms. Norms of the maps that only
those have (`norm0` to `norm3`) are left out when their checkpoints are loaded: `out_norm` of the detection configs is
their place. The model fine-tuned at 384 px is the same network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.mlp import ConvMlp
from visionzoo.layers.nhwc import on_nchw
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.padding import pad_to_size
from visionzoo.layers.stem import ConvNormStem
from visionzoo.layers.tracing import one_node
from visionzoo.models._pyramid import Pyramid, build_stages, doubling
from visionzoo.models._registry import Published, Variant, register_family


class DeformableTokenMerge(nn.Module):
    """Halve a map by a 2×2 convolution whose taps move with the input, batch norm and GELU (LIT, arXiv:2105.14217).

    Args:
        in_dim: channels in.
        out_dim: channels out.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.offset = nn.Conv2d(in_dim, 8, 2, 2)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]
        self.merge = ConvNorm(in_dim, out_dim, 2, 2, norm_layer=nn.BatchNorm2d)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, in_dim] to [B, ⌊H/2⌋, ⌊W/2⌋, out_dim]; zeros beside a map of one row or column."""
        x = pad_to_size(x, (2, 2))
        return self.act(self.merge(displace(x, on_nchw(self.offset, x))))


@one_node  # it looks at the size of the map
def displace(x: Tensor, offset: Tensor) -> Tensor:
    """Read a map [B, H, W, C] beside each token of its whole 2×2 patches, bilinearly, with zeros around the map.

    `offset` [B, ⌊H/2⌋, ⌊W/2⌋, 8] holds (down, right) for the four tokens of a patch, row by row.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)  # positions need more digits than features
    offset = offset.to(accumulate).unflatten(-1, (2, 2, 2)).permute(0, 1, 3, 2, 4, 5)  # [B, h, 2, w, 2, 2]
    offset = offset.flatten(3, 4).flatten(1, 2)
    rows, columns = (torch.arange(length, device=x.device, dtype=accumulate) for length in offset.shape[1:3])
    tokens = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    row, column = (2 * (tokens + offset) + 1).unbind(-1)
    grid = torch.stack([column / x.shape[2], row / x.shape[1]], -1) - 1
    out = F.grid_sample(x.permute(0, 3, 1, 2).to(accumulate), grid, align_corners=False)
    return out.to(x.dtype).permute(0, 2, 3, 1).contiguous()


class LITv2(Pyramid):
    """LITv2.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        window_sizes: side of the windows of HiLo attention for each stage; 1 for plain attention, 0 for a stage
            without attention.
        alpha: share of the heads that attend to means instead of inside windows.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.
    """

    TWICE = TorchVersion(torch.__version__) >= "2.14"  # 2.11 has no second derivative of bilinear reading
    CHECKPOINT_KEYS = {
        "authors": [
            (r"^norm\d\.", None),
            (r"^patch_embed\.proj\.", "stem.conv."),
            (r"^patch_embed\.norm\.", "stem.norm."),
            (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
            (r"\.dconv\.conv_offset\.", ".offset."),
            (r"\.dconv\.", ".merge.conv."),
            (r"\.norm_layer\.", ".merge.norm."),
            (r"^layers\.(\d)\.", r"stages.\1."),
            (r"\.attn\.l_", ".mixer.low_"),
            (r"\.attn\.h_", ".mixer.high_"),
            (r"\.dwconv\.dwconv\.", ".dwconv."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        hilo = {"type": "hilo", "alpha": alpha, "qkv_bias": qkv_bias}
        own = [[{**hilo, "window_size": size} if size else {"type": "none"}] for size in window_sizes]
        super().__init__(
            stem=ConvNormStem(in_chans, embed_dims[0], 4, 4, norm_layer=LayerNorm, pad_to_stride=True),
            stages=build_stages(
                embed_dims,
                depths,
                num_heads,
                resolve_mixers(own, mixers),
                downsample=DeformableTokenMerge,
                block=partial(Block, mlp_ratio=mlp_ratio, mlp_layer=ConvMlp),
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            norm=LayerNorm(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )


def _no_weights(size: str) -> str:
    return f"timm has none; the authors' are at https://github.com/ziplab/LITv2/releases/download/v1.0/litv2_{size}.pth"


_README = "README.md of ziplab/LITv2"
_DEEP = (2, 2, 18, 2)

VARIANTS = {
    "zoo_litv2_s": Variant({}, Published(28, 3.7, 82.0, source=_README), no_weights=_no_weights("s")),
    "zoo_litv2_m": Variant({"depths": _DEEP}, Published(49, 7.5, 83.3, source=_README), no_weights=_no_weights("m")),
    "zoo_litv2_b": Variant(
        doubling(128, _DEEP),
        Published(87, 13.2, 83.6, source=_README),
        no_weights=_no_weights("b"),
    ),
}

TINY = {"zoo_litv2_s": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}}

register_family(
    __name__,
    LITv2,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.conv",
    paper_ids="arXiv:2205.13213",
    origin_url="https://github.com/ziplab/LITv2",
    license="apache-2.0",
)
