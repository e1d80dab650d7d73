"""Parts of networks that are no mixers, gates or reducers, each with its inputs, for tests of what holds of all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from visionzoo.decoders import EDAFormerDecoder, FussFreeDecoder, GuidedAttentionDecoder, ParaTransCNNDecoder
from visionzoo.layers.bottleneck import BasicBlock, Bottleneck
from visionzoo.layers.bridging import BridgingAttention
from visionzoo.layers.class_attention import ContextBlock, ContextHead
from visionzoo.layers.class_queries import ClassQueryHead
from visionzoo.layers.conv_norm import (
    BranchedDepthwiseConv,
    ConvNorm,
    DepthwiseConvNorm,
    InvertedResidual,
    LinearNorm,
    LinearNormMlp,
    ResidualConvNorm,
)
from visionzoo.layers.foreground import BestTokensAttention, ForegroundScores
from visionzoo.layers.heads import BatchNormHead, ClassAttentionHead, HiddenLayerHead, ProjectionHead, TokenHead
from visionzoo.layers.latents import CrossAttention
from visionzoo.layers.level_attention import LevelAttention
from visionzoo.layers.map_heads import AttentiveHead, EfficientProbeHead, EfficientProbing
from visionzoo.layers.mimicking import CrossAttentionProjector
from visionzoo.layers.mlp import ConvMlp, IstaStep, NormedGlu, SqueezeExciteMlp
from visionzoo.layers.nhwc import DepthwiseConvNHWC, GroupNorm1
from visionzoo.layers.norm import DeviationNorm, LayerNorm, ScaleNorm, TokenBatchNorm
from visionzoo.layers.patch_merge import PatchMerge
from visionzoo.layers.position import PositionGenerator, PositionTable
from visionzoo.layers.pyramid_fusion import PyramidFusion
from visionzoo.layers.stem import ConvNormStem, NormedPatchStem, PatchStem, PixelsToTokens, conv_stem

Shape = Callable[[int, int, int], tuple[int, ...]]  # batch, height and width to a shape


@dataclass(frozen=True)
class Part:
    """How a part is built, of what shapes its inputs are, and how it is called with them."""

    make: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    call: Callable[..., Any] = lambda module, *inputs: module(*inputs)

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Build it with weights of no symmetry, for inference."""
        torch.manual_seed(0)
        module = self.make().to(dtype).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return module

    def inputs(
        self, batch: int = 2, height: int = 6, width: int = 7, dtype: torch.dtype = torch.float64
    ) -> list[Tensor]:
        """Return inputs for a map of this size."""
        generator = torch.Generator().manual_seed(1)
        shapes = [shape(batch, height, width) for shape in self.shapes]
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    def __call__(self, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
        """Return the outputs."""
        out = self.call(module, *inputs)
        return [out] if isinstance(out, Tensor) else list(out)


def nhwc(channels: int) -> Shape:
    """Return the shape of a map [B, H, W, C]."""
    return lambda batch, height, width: (batch, height, width, channels)


def nchw(channels: int, level: int = 0) -> Shape:
    """Return the shape of a map [B, C, H, W], of a level of a pyramid."""
    return lambda batch, height, width: (batch, channels, -(-height // 2**level), -(-width // 2**level))


def tokens(channels: int, prefix: int = 0) -> Shape:
    """Return the shape of tokens [B, P + N, C]."""
    return lambda batch, height, width: (batch, prefix + height * width, channels)


def some(count: int, channels: int) -> Shape:
    """Return the shape of a fixed number of tokens."""
    return lambda batch, height, width: (batch, count, channels)


def listed(module: nn.Module, *inputs: Tensor) -> Any:
    """Call a part that takes its inputs as one list."""
    return module(list(inputs))


def bridged(module: nn.Module, pixels: Tensor, places: Tensor, points: Tensor, point_places: Tensor) -> Any:
    """Call the attention of pixels to points, on one level."""
    return module([pixels], [places], [[points]], [[point_places]])


def two_levels(module: nn.Module, fine: Tensor, coarse: Tensor) -> Any:
    """Call a part that takes two levels as tokens, and their sizes."""
    sizes = [(x.shape[1], x.shape[2]) for x in (fine, coarse)]
    return module(torch.cat([fine.flatten(1, 2), coarse.flatten(1, 2)], 1), sizes)


BRIDGE = (nhwc(16), nhwc(2), some(5, 16), some(5, 2))
PYRAMID = (nchw(8), nchw(12, 1), nchw(16, 2))
CONTEXT: Any = {"num_heads": 4, "head_dim": 4, "mlp_ratio": 2}
INTR: Any = {"hidden_dim": 16, "num_heads": 4, "enc_layers": 1, "dec_layers": 1, "mlp_dim": 16}
PARTS: dict[str, Part] = {
    "conv_stem": Part(lambda: conv_stem(3, (8, 16), 3, (2, 2), nn.GELU, pool=True), (nchw(3),)),
    "conv_norm_stem": Part(lambda: ConvNormStem(3, 16, 3, 2, 1, norm_layer=LayerNorm), (nchw(3),)),
    "patch_stem": Part(lambda: PatchStem(3, 16, 4), (nchw(3),)),
    "normed_patch_stem": Part(lambda: NormedPatchStem(3, 16, 4), (nchw(3),)),
    "pixels_to_tokens": Part(lambda: PixelsToTokens(6, 4, 16), (lambda b, h, w: (b, h * w, 2, 3, 4),)),
    "patch_merge": Part(lambda: PatchMerge(16, 24), (nhwc(16),)),
    "layer_norm": Part(lambda: LayerNorm(16), (nhwc(16),)),
    "scale_norm": Part(lambda: ScaleNorm(16), (nhwc(16),)),
    "token_batch_norm": Part(lambda: TokenBatchNorm(16), (nhwc(16),)),
    "deviation_norm": Part(lambda: DeviationNorm(16), (nhwc(16),)),
    "group_norm": Part(lambda: GroupNorm1(16), (nhwc(16),)),
    "batch_norm_head": Part(lambda: BatchNormHead(16, 5, distilled=True), (nchw(16),)),
    "projection_head": Part(lambda: ProjectionHead(16, 5, hidden_features=12), (nchw(16),)),
    "hidden_layer_head": Part(lambda: HiddenLayerHead(16, 5, conv_features=12, hidden_features=8), (nchw(16),)),
    "class_attention_head": Part(lambda: ClassAttentionHead(16, 5, num_heads=4), (nchw(16),)),
    "token_head": Part(lambda: TokenHead(16, 5), (tokens(16, 1),)),
    "attentive_head": Part(lambda: AttentiveHead(16, 5, num_heads=4), (nchw(16),)),
    "ep_head": Part(lambda: EfficientProbeHead(16, 5, num_queries=4), (nchw(16),)),
    "ep": Part(lambda: EfficientProbing(16, num_queries=4), (tokens(16),)),
    "intr": Part(lambda: ClassQueryHead(16, 5, **INTR), (nchw(16),)),
    "context_head": Part(
        lambda: ContextHead(16, 5, depth=1, block=lambda dim: ContextBlock(dim, 4, 4, 2)), (tokens(16),)
    ),
    "context_block": Part(lambda: ContextBlock(16, **CONTEXT), (some(1, 16), tokens(16))),
    "cross_attention": Part(lambda: CrossAttention(16, 12, 8), (some(5, 16), tokens(12))),
    "conv_norm": Part(lambda: ConvNorm(16, 24, 3, 2, 1, norm_layer=nn.BatchNorm2d), (nhwc(16),)),
    "depthwise_conv": Part(lambda: DepthwiseConvNHWC(16, 3), (nhwc(16),)),
    "depthwise_conv_norm": Part(lambda: DepthwiseConvNorm(16, 3), (nhwc(16),)),
    "branched_depthwise_conv": Part(lambda: BranchedDepthwiseConv(16, 32, 7, 2), (nhwc(16),)),
    "residual_conv_norm": Part(lambda: ResidualConvNorm(16), (nhwc(16),)),
    "linear_norm": Part(lambda: LinearNorm(16, 24), (nhwc(16),)),
    "linear_norm_mlp": Part(lambda: LinearNormMlp(16, 24), (nhwc(16),)),
    "inverted_residual": Part(lambda: InvertedResidual(16, 24, ratio=2, act_layer=nn.SiLU, stride=2), (nhwc(16),)),
    "conv_mlp": Part(lambda: ConvMlp(16, 24, gated=True), (nhwc(16),)),
    "squeeze_excite_mlp": Part(lambda: SqueezeExciteMlp(16, 24), (tokens(16),)),
    "normed_glu": Part(lambda: NormedGlu(16, 24), (nhwc(16),)),
    "ista_step": Part(lambda: IstaStep(16), (nhwc(16),)),
    "basic_block": Part(lambda: BasicBlock(16, 24, stride=2), (nhwc(16),)),
    "bottleneck": Part(lambda: Bottleneck(16, 24, 8, stride=2, gate=SqueezeExcite), (nhwc(16),)),
    "position_table": Part(lambda: PositionTable(16, (4, 5)), (nhwc(16),)),
    "position_generator": Part(lambda: PositionGenerator(16), (nhwc(16),)),
    "level_attention": Part(lambda: LevelAttention(16, 3), (nchw(16), nchw(16, 1), nchw(16, 2)), listed),
    "pyramid_fusion": Part(lambda: PyramidFusion([8, 12, 16], 32, 8), PYRAMID, listed),
    "bridging": Part(lambda: BridgingAttention(16, 4), BRIDGE, bridged),
    "bridging_offset": Part(
        lambda: BridgingAttention(16, 4, cat_offset=True, location={"base_size": None, "log_scale": True}),
        BRIDGE,
        bridged,
    ),
    "foreground": Part(
        lambda: ForegroundScores(16, 2), (nhwc(16), lambda b, h, w: (b, -(-h // 2), -(-w // 2), 16)), two_levels
    ),
    "best_tokens": Part(
        lambda: BestTokensAttention(16, 4, num_tokens=5), (tokens(16), tokens(16), lambda b, h, w: (b, h * w))
    ),
    "projector": Part(
        lambda: CrossAttentionProjector(8, 16, (3, 4), (4, 5), num_heads=4), (lambda b, h, w: (b, 8, 3, 4),)
    ),
    "edaformer": Part(lambda: EDAFormerDecoder([8, 12, 16], 5, embed_dim=8), PYRAMID, listed),
    "fuss_free": Part(lambda: FussFreeDecoder([8, 12, 16], 5, up="c", head="c"), PYRAMID, listed),
    "guided_attention": Part(lambda: GuidedAttentionDecoder([8, 12], 5, embed_dim=4), PYRAMID[:2], listed),
    "paratranscnn": Part(lambda: ParaTransCNNDecoder([8, 12, 16], 5, embed_dim=8), PYRAMID, listed),
}
