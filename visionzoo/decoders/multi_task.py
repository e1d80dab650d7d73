"""One backbone for two tasks: which classes are in an image, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import Mlp, SelectAdaptivePool2d
from torch import Tensor, nn

from visionzoo.decoders.segmentor import Segmentor
from visionzoo.layers.norm import LayerNorm
from visionzoo.text import count_of


class Answers(NamedTuple):
    """What a network of several tasks makes of a batch."""

    labels: Tensor  # [B, K], logits of the classes of an image, each with a sigmoid of its own
    pixels: Tensor  # [B, num_classes, H, W], logits of the class of each pixel
    maps: list[Tensor]  # [B, C, H', W'] of the backbone, finest first


class MultiTaskNetwork(nn.Module):
    """A segmentor whose backbone's last map is also classified: any number of classes an image.

    The map's means and maxima, normalized, pass an MLP. Which classes these are is a buffer, `label_classes`, so that a
    checkpoint has it.

    Args:
        segmentor: its backbone is that of both tasks; its decoder labels pixels.
        label_classes: numbers, among the segmentor's classes, of those that images are classified by.
        hidden_dim: hidden width of that MLP.

    Raises:
        ValueError: if there is no such class, a number is not one of the segmentor's, or the width is not positive.

    >>> import torch, visionzoo
    >>> segmentor = visionzoo.create_segmentor("zoo_pvtv2_b0", "edaformer", num_classes=5)
    >>> network = MultiTaskNetwork(segmentor, label_classes=[1, 2, 4]).eval()
    >>> labels, pixels, _ = network(torch.zeros(1, 3, 50, 70))
    >>> labels.shape, pixels.shape
    (torch.Size([1, 3]), torch.Size([1, 5, 50, 70]))
    """

    label_classes: Tensor

    def __init__(self, segmentor: Segmentor, label_classes: Sequence[int], *, hidden_dim: int = 256):
        super().__init__()
        wrong = [number for number in label_classes if not 0 <= number < segmentor.num_classes]
        if not len(label_classes) or wrong:
            raise ValueError(
                f"MultiTaskNetwork: label_classes are one or more of the segmentor's "
                f"{count_of(segmentor.num_classes, 'class')}, from 0, got {list(label_classes)}"
            )
        if hidden_dim < 1:
            raise ValueError(f"MultiTaskNetwork: hidden_dim must be 1 or more, got {hidden_dim=}")
        self.segmentor = segmentor
        self.register_buffer("label_classes", torch.tensor(list(label_classes)))
        dim = 2 * segmentor.decoder.in_channels[-1]
        self.classifier = nn.Sequential(
            SelectAdaptivePool2d(pool_type="catavgmax", flatten=True),
            LayerNorm(dim),
            Mlp(dim, hidden_dim, len(label_classes)),
        )

    @property
    def num_classes(self) -> int:
        """Classes of the pixels."""
        return self.segmentor.num_classes

    def forward(self, x: Tensor) -> Answers:
        """Image [B, in_chans, H, W] to what is in it and where."""
        maps = self.segmentor.forward_maps(x)
        return Answers(self.classifier(maps[-1]), self.segmentor.decode_maps(maps, x), maps)

    def label_targets(self, masks: Tensor) -> Tensor:
        """Return which of its label classes the masks [B, H, W] show: [B, K] of zeros and ones."""
        shown = masks.flatten(1)[:, None] == self.label_classes[:, None]
        return shown.any(-1).float()
