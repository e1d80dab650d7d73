"""Mask2Former whose encoder stops early, after as many layers as an image needs (ECO-M2F).

Efficient Transformer Encoders for Mask2Former-style models (arXiv:2404.15244), written from the paper, as its code may
not be reused. Three steps: training with a loss after every layer of the pixel decoder's encoder; the quality of each
exit on each training image, less a price per layer; a gate on the backbone's last map that learns the best exit by
cross entropy. `visionzoo train` does the first, `gate_fitting` the others. What the paper's text did not tell us is our
choice: the factors of the exits' losses, which grow linearly with depth, and the gate's layers. We measure an image's
quality by its mIoU, as this is semantic segmentation; the paper takes panoptic quality.

`custom_imports = dict(imports=["visionzoo.openmmlab.encoder_exits"])` in a config registers the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmdet.models.layers import MSDeformAttnPixelDecoder
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from mmseg.models.decode_heads.mask2former_head import Mask2FormerHead
from torch import Tensor, nn
from torch.nn import functional as F

GATE = "gate"


class Decoded(NamedTuple):
    """What a pixel decoder makes of a backbone's maps."""

    mask_feature: Tensor  # [B, C, H, W], the finest
    multi_scale_features: list[Tensor]  # [B, C, H, W], coarsest first


class ExitEncoder(nn.Module):
    """The layers of mmdet's encoder, which keeps the tokens after each of them and stops after the first `stop`."""

    stop: int | None = None

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = layers

    def forward(self, query: Tensor, **inputs: Any) -> Tensor:
        """Tokens [B, N, C] to tokens; `inputs` are those of the layers."""
        self.states: list[Tensor] = []
        for layer in self.layers[: self.stop]:
            query = layer(query=query, **inputs)
            self.states.append(query)
        return query


@MODELS.register_module()
class ExitPixelDecoder(MSDeformAttnPixelDecoder):
    """mmdet's pixel decoder with an exit after every layer of its encoder; arguments and weights are mmdet's."""

    encoder: Any  # mmdet's, then ours of its layers

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.encoder = ExitEncoder(self.encoder.layers)

    def forward(self, feats: Sequence[Tensor] | Decoded) -> Decoded:
        """Decode a backbone's maps [B, C, H, W], finest first, by all layers; what is decoded already stays."""
        return feats if isinstance(feats, Decoded) else self.decode_after(feats, [len(self.encoder.layers)])[0]

    def decode_after(self, feats: Sequence[Tensor], layers: Sequence[int]) -> list[Decoded]:
        """Decode a backbone's maps, finest first, after each of some numbers of layers; later layers do not run."""
        deepest = max(layers)
        self.encoder.stop = deepest
        last = Decoded(*super().forward(feats))
        states, self.encoder.states = self.encoder.states, []  # or they would live until the next batch
        return [last if number == deepest else self._decode(states[number - 1], feats) for number in layers]

    def _decode(self, tokens: Tensor, feats: Sequence[Tensor]) -> Decoded:
        """Turn the tokens of an exit into maps, as mmdet does after the last layer."""
        coarsest_first = feats[::-1]
        sizes = [x.shape[-2:] for x in coarsest_first[: self.num_encoder_levels]]
        levels = tokens.mT.split([size.numel() for size in sizes], -1)
        maps = [level.unflatten(-1, size) for level, size in zip(levels, sizes, strict=True)]
        finer = coarsest_first[self.num_encoder_levels :]
        for x, lateral, output in zip(finer, self.lateral_convs, self.output_convs, strict=True):
            x = lateral(x)
            maps.append(output(x + F.interpolate(maps[-1], x.shape[-2:], mode="bilinear", align_corners=False)))
        return Decoded(self.mask_feature(maps[-1]), maps[: self.num_outs])


class LayersGate(nn.Module):
    """How many layers of the encoder an image needs, by the mean of the backbone's last map.

    Args:
        channels: of the map.
        layers: of the encoder.
    """

    def __init__(self, channels: int, layers: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.score = nn.Linear(channels, layers)

    @staticmethod
    def pool(x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C], in float32 at least."""
        return x.to(torch.promote_types(x.dtype, torch.float32)).mean((2, 3))

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, C] to scores [B, layers], of 1 layer first."""
        scores: Tensor = self.score(self.norm(pooled))
        return scores


@MODELS.register_module()
class ExitMask2FormerHead(Mask2FormerHead):
    """mmseg's Mask2Former head that learns from every exit of its pixel decoder, and answers from one of them.

    With all layers it is mmseg's head to the bit, with weights of the same names.

    Args:
        in_channels: channels of the backbone's maps, finest first.
        pixel_decoder: an `ExitPixelDecoder` with an encoder of N layers.
        exit_weights: N factors of the exits' losses, 0 or more, the last above 0; a gate does not learn to choose those
            of 0. None for 1/N, 2/N, ... 1.
        encoder_layers: how many layers run in inference: 1 to N, "gate" for what the gate chooses by the image, or None
            for N. Only with "gate" there is a gate; `visionzoo fit-gate` fits it, training leaves it as it is.
        head: of mmseg's head.

    Raises:
        ValueError: weights or layers are out of range, or the pixel decoder has no exits.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        pixel_decoder: Mapping[str, Any],
        exit_weights: Sequence[float] | None = None,
        encoder_layers: int | str | None = None,
        **head: Any,
    ):
        super().__init__(in_channels=in_channels, pixel_decoder=pixel_decoder, **head)
        if not isinstance(self.pixel_decoder, ExitPixelDecoder):
            raise ValueError(
                f"expected pixel_decoder of type 'ExitPixelDecoder', which has exits, got {pixel_decoder['type']!r}"
            )
        number = len(self.pixel_decoder.encoder.layers)
        weights = [k / number for k in range(1, number + 1)] if exit_weights is None else exit_weights
        listed = isinstance(weights, Sequence) and len(weights) == number
        if not (listed and all(type(w) in (int, float) and 0 <= w < float("inf") for w in weights) and weights[-1]):
            raise ValueError(
                f"exit_weights must be {number} numbers, one for each layer of the encoder, 0 or more and the last "
                f"above 0, got {exit_weights}"
            )
        if not (encoder_layers in (None, GATE) or (type(encoder_layers) is int and 1 <= encoder_layers <= number)):
            raise ValueError(f"encoder_layers must be 1 to {number}, 'gate', or None for all, got {encoder_layers!r}")
        self.exit_weights = {k: weight for k, weight in enumerate(weights, 1) if weight}
        self.encoder_layers = number if encoder_layers is None else encoder_layers
        self.used = [0] * number  # images, by how many layers ran less 1
        if encoder_layers == GATE:
            self.gate = LayersGate(in_channels[-1], number).requires_grad_(False)

    def loss(self, x: Sequence[Tensor], batch_data_samples: Any, train_cfg: Any) -> dict[str, Tensor]:
        """Return mmseg's losses of the last exit, and as `exitK.NAME` those after K layers, times their weights."""
        losses: dict[str, Tensor] = {}
        decoded = self.pixel_decoder.decode_after(x, [*self.exit_weights])
        for (layers, weight), maps in zip(self.exit_weights.items(), decoded, strict=True):
            prefix = "" if layers == len(self.used) else f"exit{layers}."
            own = super().loss(maps, batch_data_samples, train_cfg)
            losses |= {f"{prefix}{name}": weight * value for name, value in own.items()}
        return losses

    def predict(self, x: Sequence[Tensor] | Decoded, batch_img_metas: Any, test_cfg: Any) -> Tensor:
        """Turn a backbone's maps, finest first, or what is decoded of them, into scores [B, num_classes, H, W]."""
        if isinstance(x, Decoded):
            return self._segment(x, batch_img_metas, test_cfg)
        layers = self.choose_layers(x)
        for number in layers:
            self.used[number - 1] += 1
        parts, order = [], []
        for number in sorted(set(layers)):
            images = [image for image, own in enumerate(layers) if own == number]
            maps = x if len(images) == len(layers) else [each[images] for each in x]
            (decoded,) = self.pixel_decoder.decode_after(maps, [number])
            parts.append(self._segment(decoded, batch_img_metas, test_cfg))
            order += images
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.tensor(order, device=x[0].device).argsort()]

    def _segment(self, decoded: Decoded, batch_img_metas: Any, test_cfg: Any) -> Tensor:
        logits: Tensor = super().predict(decoded, batch_img_metas, test_cfg)
        return logits

    def choose_layers(self, x: Sequence[Tensor]) -> list[int]:
        """Return how many layers each image of a batch gets, by `encoder_layers`."""
        if self.encoder_layers == GATE:
            return [int(index) + 1 for index in self.gate(LayersGate.pool(x[-1])).argmax(-1).tolist()]
        return [int(self.encoder_layers)] * len(x[0])


@HOOKS.register_module()
class EncoderLayersHook(Hook):
    """Adds `encoder_layers` to the metrics: the mean number of the encoder's layers that ran for an image or window."""

    priority = "HIGHEST"  # before the hook that passes metrics on to the log

    def before_val_epoch(self, runner: Runner) -> None:
        """Forget those before."""
        head = _head(runner)
        head.used = [0] * len(head.used)

    before_test_epoch = before_val_epoch

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Add the mean over all processes."""
        used = torch.tensor(_head(runner).used, device=next(runner.model.parameters()).device)
        all_reduce(used)
        numbers = torch.arange(1, len(used) + 1, device=used.device)
        if metrics is not None and used.any():
            metrics["encoder_layers"] = float((used * numbers).sum() / used.sum())

    after_test_epoch = after_val_epoch


def _head(runner: Runner) -> ExitMask2FormerHead:
    model: Any = runner.model.module if is_model_wrapper(runner.model) else runner.model
    head: ExitMask2FormerHead = model.decode_head
    return head
