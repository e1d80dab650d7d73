"""What a training step of several tasks at several widths learns from."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from torch import Tensor

from visionzoo.decoders.multi_task import Answers, MultiTaskNetwork
from visionzoo.engine.multi_task.data import UNLABELED
from visionzoo.engine.multi_task.flags import TaskConfig
from visionzoo.slimming import slimmed_call

# What a share of a network's widths is given for, by the beginning of the layers' names.
PARTS = {"encoder": "segmentor.backbone", "segmentation": "segmentor.decoder", "classification": "classifier"}


def by_layers(shares: Mapping[str, float]) -> dict[str, float]:
    """Return shares by the names of `PARTS` as `visionzoo.slimming` takes them."""
    return {PARTS[part]: share for part, share in shares.items()}


class SandwichTask(TrainingTask):
    """The full width learns from labels; the smallest and a random one learn from what the full one answers.

    The sandwich rule and distillation in place are those of https://arxiv.org/abs/1903.05134. That the maps of the
    encoder stay alike at every width is the idea of https://arxiv.org/abs/2308.11744; here, 1 minus the cosine of their
    vectors of channels, as a mean over all places.

    Args:
        network: what is trained.
        config: weights of the losses, and the smallest width.
        class_weights: [num_classes], of the pixels.
        device: of the network.

    Attributes:
        slims: whether slimmed widths learn, too.
    """

    class_weights: Tensor

    def __init__(
        self, network: MultiTaskNetwork, config: TaskConfig, class_weights: Tensor, device: torch.device
    ) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module = network
        self.config = config
        self.slims = config.min_width < 1
        self.register_buffer("class_weights", class_weights.to(device, torch.float32))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Return `loss` and its parts; `output` are the logits of the pixels.

        Args:
            input: images [B, 3, H, W].
            target: masks [B, H, W].
        """
        config, network = self.config, self.trainable_module
        full = network(input)
        parts = losses(network, full, target, self.class_weights)
        loss = parts["pixel_loss"] + config.label_weight * parts["label_loss"]
        if self.slims:
            taught = Answers(full.labels.detach(), full.pixels.detach(), [x.detach() for x in full.maps])
            weights = pixel_weights(target, self.class_weights)
            answers, features = zip(
                *(self._learned(slimmed_call(network, shares, input), taught, weights) for shares in self._draw()),
                strict=True,
            )
            parts |= {"answer_loss": torch.stack(answers).mean(), "feature_loss": torch.stack(features).mean()}
            loss = loss + config.distill_weight * parts["answer_loss"] + config.feature_weight * parts["feature_loss"]
        return {"loss": loss, "output": full.pixels, **parts}

    def set_epoch(self, epoch: int) -> None:
        """Let slimmed widths learn from the epoch on that is asked for."""
        self.slims = self.config.min_width < 1 and epoch >= self.config.slim_epoch

    def _draw(self) -> list[dict[str, float]]:
        """Return the smallest widths, and random ones of each part."""
        low = self.config.min_width
        drawn = (low + (1 - low) * torch.rand(len(PARTS))).tolist()  # of torch's global state, which the step seeds
        return [by_layers(dict.fromkeys(PARTS, low)), by_layers(dict(zip(PARTS, drawn, strict=True)))]

    def _learned(self, own: Answers, taught: Answers, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far answers, and maps, are from those of the full width."""
        labels = F.binary_cross_entropy_with_logits(own.labels, taught.labels.sigmoid())
        pixels = F.kl_div(
            own.pixels.float().log_softmax(1), taught.pixels.float().log_softmax(1), reduction="none", log_target=True
        ).sum(1)
        apart = [
            1 - F.cosine_similarity(mine.float(), its.float(), dim=1).mean()
            for mine, its in zip(own.maps, taught.maps, strict=True)
        ]
        return weighted_mean(pixels, weights) + self.config.label_weight * labels, torch.stack(apart).mean()


def losses(
    network: MultiTaskNetwork, answers: Answers, masks: Tensor, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the mean cross-entropy of the labeled pixels, and the binary one of the images' labels.

    Args:
        network: that answered.
        answers: of a batch.
        masks: [B, H, W], of its pixels.
        class_weights: [num_classes], of the pixels; None for all alike.
    """
    pixels = F.cross_entropy(answers.pixels.float(), masks, ignore_index=UNLABELED, reduction="none")
    labels = F.binary_cross_entropy_with_logits(answers.labels.float(), network.label_targets(masks))
    return {"pixel_loss": weighted_mean(pixels, pixel_weights(masks, class_weights)), "label_loss": labels}


def pixel_weights(masks: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return the weight of each pixel's class, [B, H, W]; 1 without such weights, and 0 of what is not labeled."""
    known = masks != UNLABELED
    return known.float() if class_weights is None else torch.where(known, class_weights[masks.where(known, 0)], 0.0)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of values by weights from 0; 0 where no weight is above it."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-12)


def balanced_weights(pixels: Tensor, power: float) -> Tensor:
    """Return weights of classes: their share of all pixels to the power of minus `power`, 1 as a mean over the pixels.

    Args:
        pixels: [C], of each class; one that does not occur weighs nothing.
        power: from 0, for all alike.
    """
    share = pixels.double() / pixels.sum()
    weights = torch.where(share > 0, share.clamp(min=1e-12) ** -power, 0.0)
    return weights / (weights * share).sum()
