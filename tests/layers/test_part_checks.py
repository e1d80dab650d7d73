"""What parts are built of and called with is checked: messages say what was expected, what came and what to do."""

import re

import pytest
import torch
from layers.parts import PARTS
from torch import nn

from visionzoo.decoders import EDAFormerDecoder, FussFreeDecoder
from visionzoo.layers.bottleneck import BasicBlock, Bottleneck
from visionzoo.layers.branches import ClassTokenFusion
from visionzoo.layers.class_attention import ContextBlock
from visionzoo.layers.conv_norm import ConvNorm, DepthwiseConvNorm, InvertedResidual, LinearNorm, LinearNormMlp
from visionzoo.layers.foreground import ForegroundScores
from visionzoo.layers.heads import BatchNormHead, HiddenLayerHead, ProjectionHead, TokenHead
from visionzoo.layers.latents import ClassShortcut, CrossAttention, PooledClassifier
from visionzoo.layers.map_heads import AttentiveHead, EfficientProbeHead
from visionzoo.layers.mimicking import CrossAttentionProjector
from visionzoo.layers.mlp import ConvMlp, NormedGlu, SqueezeExciteMlp
from visionzoo.layers.nhwc import DepthwiseConvNHWC, GroupNorm1
from visionzoo.layers.norm import DeviationNorm, ScaleNorm, TokenBatchNorm
from visionzoo.layers.patch_merge import PatchMerge
from visionzoo.layers.pooling import pool_cells
from visionzoo.layers.position import NeighborhoodBias, PositionTable, RelativePositionBias
from visionzoo.layers.reducers import build_reducer
from visionzoo.layers.stem import NormedPatchStem, PatchStem
from visionzoo.layers.tokens import PrefixTokens, TokenPositions

NORMS = {"layer_norm", "scale_norm", "token_batch_norm", "deviation_norm"}
ANY_AXES = NORMS | {"normed_glu", "ista_step", "pixels_to_tokens"}
JOINED = {"foreground"}  # what it is called with is made of the inputs


def _channel_axis(shape):
    """Return the last axis that depends on neither batch nor map; None where all do."""
    fixed = [axis for axis, sizes in enumerate(zip(shape(2, 6, 7), shape(3, 9, 11), strict=True)) if len({*sizes}) == 1]
    return fixed[-1] if fixed else None


@pytest.mark.parametrize("name", sorted({*PARTS} - JOINED))
def test_inputs_of_other_axes_channels_and_kinds_are_refused(name):
    part = PARTS[name]
    module, inputs = part.build(), part.inputs()
    for i, (x, shape) in enumerate(zip(inputs, part.shapes, strict=True)):
        wrong = {"integers": x.long()}
        if name not in ANY_AXES:
            wrong["one axis less"] = x[0]
        if (axis := _channel_axis(shape)) is not None:
            wrong["one channel more"] = torch.cat([x, x.narrow(axis, 0, 1)], axis)
        for what, other in wrong.items():
            with pytest.raises(ValueError, match=r"expected|must be"):
                part(module, *inputs[:i], other, *inputs[i + 1 :])
                pytest.fail(f"input {i}: {what} is taken")


@pytest.mark.parametrize("name", ["patch_merge", "conv_stem", "token_head", "fuss_free", "normed_patch_stem"])
def test_another_dtype_is_refused_but_under_autocast(name):
    part = PARTS[name]
    module, inputs = part.build(torch.float32), part.inputs(dtype=torch.float64)
    message = r"expected floating point in the dtype of the weights \(torch.float32\), got torch.float64; convert one"
    with pytest.raises(ValueError, match=message):
        part(module, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        part(module, *(x.bfloat16() for x in inputs))


def _maps(*channels):
    return [torch.zeros(1, dim, 8 // 2**i, 8 // 2**i) for i, dim in enumerate(channels)]


MERGE = PatchMerge(16, 24)
STEM = PatchStem(3, 16, 4)
DECODER = FussFreeDecoder([8, 12], 5, up="c", head="c")
CALLS = [
    (
        lambda: MERGE(torch.zeros(2, 6, 7, 17)),
        "PatchMerge: expected [B, H, W, C] with C = 16, got (2, 6, 7, 17); build it for C = 17, or bring the input to "
        "16",
    ),
    (lambda: MERGE(torch.zeros(2, 16, 6, 7)), "of the other order it takes x.permute(0, 2, 3, 1)"),
    (lambda: MERGE(torch.zeros(6, 7, 16)), "got (6, 7, 16); a batch of one is x[None]"),
    (lambda: MERGE(torch.zeros(2, 0, 7, 16)), "got (2, 0, 7, 16)"),
    (lambda: STEM(torch.zeros(2, 32, 32, 3)), "of the other order it takes x.permute(0, 3, 1, 2)"),
    (
        lambda: ContextBlock(16, 4, 4, 2)(torch.zeros(2, 1, 16), torch.zeros(3, 9, 16)),
        "ContextBlock: expected [B, 1, C] and [B, N, C] with C = 16, got (2, 1, 16) and (3, 9, 16)",
    ),
    (
        lambda: TokenHead(16, 5)(torch.zeros(2, 0, 16)),
        "expected 1 prefix token and those of a map, got 0 tokens",
    ),
    (
        lambda: DECODER(_maps(8)),
        "FussFreeDecoder: expected 2 maps, finest first, of 8, 12 channels, got 1; build it",
    ),
    (
        lambda: DECODER(_maps(8, 13)),
        "FussFreeDecoder: expected [B, C, H, W] with C = 12, got (1, 13, 4, 4); build it",
    ),
    (
        lambda: ForegroundScores(16, 1)(torch.zeros(2, 12, 17), [(3, 4)]),
        "ForegroundScores: expected [B, N, C] with C = 16, got (2, 12, 17); build it for C = 17",
    ),
    (
        lambda: build_reducer("class_attention", 16)(torch.zeros(2, 10, 16), None, None, None, 1),
        "expected scores [B, M] of the tokens behind 1 prefix token, their class_attention in the block before, got",
    ),
    (
        lambda: build_reducer("class_attention", 16)(torch.zeros(2, 10, 16), None, None, torch.zeros(2, 10), 1),
        "ClassAttentionReducer: expected [B, M] with B = 2, M = 9, got (2, 10)",
    ),
    (
        lambda: build_reducer("token_pooling", 16)(
            torch.zeros(2, 10, 16), None, torch.ones(2, 9).bool(), torch.zeros(2, 9), 1
        ),
        "TokenPoolingReducer: expected tokens that are all there, got keep; put it before what drops tokens",
    ),
    (
        lambda: pool_cells(torch.zeros(2, 6, 16), (7, 7)),
        "pool_cells: expected a map [B, H, W, C] and sizes of 1 or more, got (2, 6, 16)",
    ),
    (lambda: pool_cells(torch.zeros(2, 6, 7, 16), (0, 7)), "got (2, 6, 7, 16) and size=(0, 7)"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message for _, message in CALLS])
def test_messages_say_what_was_expected_what_came_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


ARGUMENTS = [  # -> arguments that are numbers
    (AttentiveHead, {"in_features": 16, "num_classes": 5, "drop_rate": 0.0}),
    (BatchNormHead, {"in_features": 16, "num_classes": 5, "drop_rate": 0.0}),
    (BasicBlock, {"in_dim": 8, "out_dim": 8, "stride": 1, "drop_path": 0.0}),
    (Bottleneck, {"in_dim": 8, "out_dim": 8, "mid_dim": 4, "stride": 1, "groups": 1, "drop_path": 0.0}),
    (ClassShortcut, {"num_classes": 5, "dim": 8}),
    (ClassTokenFusion, {"dim": 8, "other_dim": 12, "num_heads": 4, "drop_path": 0.0}),
    (ContextBlock, {"dim": 8, "num_heads": 2, "head_dim": 4}),
    (ConvMlp, {"dim": 8, "hidden_dim": 16, "drop": 0.0}),
    (ConvNorm, {"in_dim": 8, "out_dim": 8, "kernel_size": 3, "stride": 1, "padding": 1, "groups": 1}),
    (CrossAttention, {"dim": 8, "context_dim": 8, "inner_dim": 8, "places": 0}),
    (CrossAttentionProjector, {"num_heads": 4}),
    (DepthwiseConvNHWC, {"dim": 8, "kernel_size": 3, "heads": 1}),
    (DepthwiseConvNorm, {"dim": 8, "kernel_size": 3}),
    (DeviationNorm, {"dim": 8}),
    (EDAFormerDecoder, {"num_classes": 5, "embed_dim": 8, "mlp_ratio": 2.0}),
    (EfficientProbeHead, {"in_features": 32, "num_classes": 5, "drop_rate": 0.0}),
    (GroupNorm1, {"dim": 8}),
    (HiddenLayerHead, {"in_features": 8, "num_classes": 5, "conv_features": 8, "hidden_features": 8}),
    (InvertedResidual, {"in_dim": 8, "out_dim": 8, "stride": 1}),
    (LinearNorm, {"in_dim": 8, "out_dim": 8}),
    (LinearNormMlp, {"dim": 8, "hidden_dim": 8, "drop": 0.0}),
    (NeighborhoodBias, {"num_heads": 2}),
    (NormedGlu, {"dim": 8, "hidden_dim": 8, "drop": 0.0}),
    (NormedPatchStem, {"in_chans": 3, "dim": 8, "patch_size": 4}),
    (PatchMerge, {"in_dim": 8, "out_dim": 8}),
    (PatchStem, {"in_chans": 3, "dim": 8, "patch_size": 4}),
    (PooledClassifier, {"in_features": 8, "num_classes": 5, "drop_rate": 0.0}),
    (PositionTable, {"dim": 8, "size": 4}),
    (PrefixTokens, {"dim": 8, "reg_tokens": 0}),
    (ProjectionHead, {"in_features": 8, "num_classes": 5, "hidden_features": 8}),
    (RelativePositionBias, {"num_heads": 2, "size": 3}),
    (ScaleNorm, {"dim": 8}),
    (SqueezeExciteMlp, {"dim": 8, "hidden": 16}),
    (TokenBatchNorm, {"dim": 8}),
    (TokenHead, {"in_features": 8, "num_classes": 5, "drop_rate": 0.0, "prefix_tokens": 1}),
    (TokenPositions, {"dim": 8, "prefix": 0}),
]
OTHERS = {  # arguments that they need besides
    ContextBlock: {"mlp_ratio": 2},
    CrossAttentionProjector: {"dim": 8, "out_dim": 8, "size": (2, 2), "out_size": (2, 2)},
    EDAFormerDecoder: {"in_channels": [8, 8]},
    InvertedResidual: {"ratio": 2, "act_layer": nn.ReLU},
    NeighborhoodBias: {"kernel_size": (3, 3)},
    PooledClassifier: {"hidden_features": None},
    TokenPositions: {"size": (2, 2)},
}


@pytest.mark.parametrize(("part", "numbers"), ARGUMENTS, ids=[part.__name__ for part, _ in ARGUMENTS])
def test_arguments_out_of_range_and_of_another_type_are_named(part, numbers):
    others = OTHERS.get(part, {})
    part(**others, **numbers)
    for name, value in numbers.items():
        for wrong in (-1, float("nan"), "4", None):
            with pytest.raises(ValueError, match=rf"{part.__name__}: .*\b{name}\b.*got .*{name}={wrong!r}"):
                part(**others, **{**numbers, name: wrong})
                pytest.fail(f"{name}={wrong!r} of {value!r} is taken")
