"""NAT: Neighborhood Attention Transformer, CVPR 2023, https://arxiv.org/abs/2204.07143.

Facts from https://github.com/SHI-Labs/Neighborhood-Attention-Transformer at d334f5b (MIT license); the code here is our
own. Its stem and downsampling are overlapping convolutions, without activation between those of the stem. As there
(with NATTEN before 0.17) maps smaller than a neighborhood are padded; of the dense tasks' backbones the norm of each
output (`norm0` to `norm3`) is left out when their checkpoints are loaded: `out_norm` of the detection configs is its
place. Weights load by the authors' names and by those of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from visionzoo.layers.block import Block
from visionzoo.layers.conv_norm import ConvNorm
from visionzoo.layers.mixers import resolve_mixers
from visionzoo.layers.nhwc import on_nchw
from visionzoo.layers.norm import LayerNorm
from visionzoo.layers.stem import Stem
from visionzoo.models._pyramid import Pyramid, build_stages, doubling
from visionzoo.models._registry import Published, Variant, register_family


class ConvStem(Stem):
    """A convolution, then one with a norm, that make the first map of an image."""

    def forward_map(self, x: Tensor) -> Tensor:
        """Image [B, H, W, in_chans] to [B, H', W', C]."""
        first, second = self
        return second(on_nchw(first, x))


class NAT(Pyramid):
    """Neighborhood Attention Transformer.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads for each stage.
        kernel_size: neighbors along an axis, or (vertical, horizontal).
        dilations: for each stage the dilations that its blocks take in turn.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether the projections to q, k, v have a bias.
        layer_scale: initial value of the learned scales of both branches; None for no scales.
        mixers: other token mixers for some stages, see `visionzoo.layers.mixers.resolve_mixers`.
        in_chans: image channels.
        drop_path_rate: stochastic depth of the last block.
        head: `num_classes`, `global_pool` and `drop_rate` of the head.

    Raises:
        ValueError: if there is no entry of dilations for each stage.
    """

    CHECKPOINT_KEYS = {
        "authors": [
            (r"^norm\d\.", None),
            (r"^patch_embed\.proj\.0\.", "stem.0."),
            (r"^patch_embed\.proj\.1\.", "stem.1.conv."),
            (r"^patch_embed\.norm\.", "stem.1.norm."),
            (r"^levels\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
            (r"\.downsample\.reduction\.", ".downsample.conv."),
            (r"^levels\.(\d)\.", r"stages.\1."),
            (r"\.attn\.rpb$", ".mixer.relative_position_bias.table"),
            (r"\.attn\.", ".mixer."),
            (r"\.gamma([12])$", r".ls\1.gamma"),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ],
        "transformers": [
            (r"^(nat|dinat)\.", ""),
            (r"^embeddings\.patch_embeddings\.projection\.0\.", "stem.0."),
            (r"^embeddings\.patch_embeddings\.projection\.1\.", "stem.1.conv."),
            (r"^embeddings\.norm\.", "stem.1.norm."),
            (r"^encoder\.levels\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
            (r"\.downsample\.reduction\.", ".downsample.conv."),
            (r"^encoder\.levels\.(\d)\.layers\.", r"stages.\1.blocks."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.attention\.self\.rpb$", ".mixer.relative_position_bias.table"),
            (r"\.attention\.self\.query\.(weight|bias)$", r".mixer.qkv.\1#0"),
            (r"\.attention\.self\.key\.(weight|bias)$", r".mixer.qkv.\1#1"),
            (r"\.attention\.self\.value\.(weight|bias)$", r".mixer.qkv.\1#2"),
            (r"\.attention\.output\.dense\.", ".mixer.proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"\.output\.dense\.", ".mlp.fc2."),
            (r"\.layer_scale_parameters$", (".ls1.gamma", ".ls2.gamma")),
            (r"^layernorm\.", "norm."),
            (r"^classifier\.", "head.fc."),
        ],
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 5),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | tuple[int, int] = 7,
        dilations: Sequence[Sequence[int]] = ((1,), (1,), (1,), (1,)),
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        mixers: Any = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ):
        neighborhood = {"type": "neighborhood", "kernel_size": kernel_size, "qkv_bias": qkv_bias}
        own = [[{**neighborhood, "dilation": dilation} for dilation in stage] for stage in dilations]
        super().__init__(
            stem=self._stem(in_chans, embed_dims[0]),
            stages=build_stages(
                embed_dims,
                depths,
                num_heads,
                resolve_mixers(own, mixers),
                downsample=self._downsample,
                block=partial(Block, mlp_ratio=mlp_ratio, norm_layer=LayerNorm, layer_scale=layer_scale),
                drop_path_rate=drop_path_rate,
            ),
            embed_dims=embed_dims,
            norm=LayerNorm(embed_dims[-1]),
            in_chans=in_chans,
            **head,
        )

    @staticmethod
    def _stem(in_chans: int, dim: int) -> nn.Module:
        return ConvStem(nn.Conv2d(in_chans, dim // 2, 3, 2, 1), ConvNorm(dim // 2, dim, 3, 2, 1, norm_layer=LayerNorm))

    @staticmethod
    def _downsample(in_dim: int, out_dim: int) -> nn.Module:
        return ConvNorm(in_dim, out_dim, 3, 2, 1, bias=False, norm_layer=LayerNorm)


def _weights(name: str) -> dict[str, Any]:
    return {"tag": "shi_in1k", "hf_hub_id": f"shi-labs/nat-{name}-in1k-224"}


def _no_weights(name: str) -> str:
    return f"the authors' are at https://shi-labs.com/projects/nat/checkpoints/CLS/nat_{name}.pth"


_README = "NAT.md of SHI-Labs/Neighborhood-Attention-Transformer"
_DEEP = (3, 4, 18, 5)

VARIANTS = {
    "zoo_nat_mini": Variant(doubling(64, (3, 4, 6, 5)), Published(20, 2.7, 81.8, source=_README), _weights("mini")),
    "zoo_nat_tiny": Variant(
        doubling(64, _DEEP), Published(28, 4.3, 83.2, source=_README), no_weights=_no_weights("tiny")
    ),
    "zoo_nat_small": Variant(
        {**doubling(96, _DEEP), "mlp_ratio": 2.0, "layer_scale": 1e-5},
        Published(51, 7.8, 83.7, source=_README),
        no_weights=_no_weights("small"),
    ),
    "zoo_nat_base": Variant(
        {**doubling(128, _DEEP), "mlp_ratio": 2.0, "layer_scale": 1e-5},
        Published(90, 13.7, 84.3, source=_README),
        _weights("base"),
    ),
}

TINY = {"zoo_nat_mini": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}}

register_family(
    __name__,
    NAT,
    VARIANTS,
    tiny=TINY,
    first_conv="stem.0",
    paper_ids="arXiv:2204.07143",
    origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    license="mit",
)
