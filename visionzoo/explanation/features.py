"""Features as colors, the spatial frequencies that a prediction stands on, and a map's overlap with a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def feature_colors(model: nn.Module, image: Tensor) -> list[tuple[str, Tensor]]:
    """Return the features of each stage or block as colors: their first three principal components.

    Args:
        model: with timm's `forward_intermediates`, in evaluation mode.
        image: [1, in_chans, H, W].

    Returns:
        for each feature its module's name and [h, w, 3] from 0 to 1, each component over its own range. Its sign is
        that with which its weight of the largest size is positive.

    Raises:
        ValueError: if the model has no such features.

    >>> import timm, visionzoo
    >>> model = timm.create_model("zoo_poolformer_s12", num_classes=2).eval()
    >>> [(name, colors.shape) for name, colors in feature_colors(model, torch.randn(1, 3, 64, 64))][0]
    ('stages.0', torch.Size([16, 16, 3]))
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates, by which timm's models give features")
    features = model.forward_intermediates(image, intermediates_only=True)  # type: ignore[operator]
    info: Any = getattr(model, "feature_info", ())
    names = [str(each["module"]) for each in info]
    names = names if len(names) == len(features) else [f"feature {i}" for i in range(len(features))]
    return [(name, principal_colors(each[0].permute(1, 2, 0))) for name, each in zip(names, features, strict=True)]


def principal_colors(feature: Tensor) -> Tensor:
    """Return the first three principal components of a map [h, w, C], each from 0 to 1: [h, w, 3]; zeros for none."""
    flat = feature.double().flatten(0, 1)
    flat = flat - flat.mean(0)
    _, sizes, directions = torch.linalg.svd(flat, full_matrices=False)
    found = flat.new_zeros(len(flat), 3)
    for i in range(min(3, len(directions))):
        if sizes[i] <= 1e-9 * sizes[0] or sizes[0] == 0:
            break
        direction = directions[i] * directions[i][directions[i].abs().argmax()].sign()
        values = flat @ direction
        found[:, i] = (values - values.min()) / (values.max() - values.min())
    return found.unflatten(0, feature.shape[:2])


@dataclass(frozen=True)
class FrequencyChannel:
    """What noise of one band of spatial frequencies does to a prediction.

    Attributes:
        bands: [K], centers of the octaves in cycles per image width.
        deviations: [S], of the noise, as shares of the range from black to white.
        probability: [S, K], mean over the draws of the class's probability in the noisy image.
        clean: without noise.
    """

    bands: Tensor
    deviations: Tensor
    probability: Tensor
    clean: float


@torch.no_grad()
def frequency_channel(
    model: nn.Module,
    image: Tensor,
    target: int,
    *,
    std: Tensor,
    deviations: tuple[float, ...] = (0.02, 0.04, 0.08, 0.16, 0.32),
    draws: int = 4,
    seed: int = 0,
) -> FrequencyChannel:
    """Return which spatial frequencies a prediction stands on: critical-band masking, octave by octave.

    Noise of one octave is added to the image, gray and of a given deviation. Where little of it takes the class away,
    the model looks at that octave: its spatial-frequency channel (Subramanian et al., NeurIPS 2023, arXiv:2309.13190;
    facts from https://github.com/ajaysub110/critical-band-masking at a2b3d94, no license: noise of the power of white
    noise of a deviation, in one octave). We differ: octaves are cut out of the spectrum, not by a Laplacian pyramid;
    the image keeps its colors and its contrast, which they cut to a fifth; and the probability of one image stands for
    the accuracy over many.

    Args:
        model: of images to logits, in evaluation mode.
        image: [1, C, H, W], normalized.
        target: number of the class.
        std: [C], by which the image was divided when it was normalized.
        deviations: of the noise, as shares of the range from black to white.
        draws: of the noise for each of its kinds.
        seed: of the draws.

    Raises:
        ValueError: if the image is smaller than 8 pixels, or the numbers are not positive.
    """
    height, width = image.shape[2:]
    if min(height, width) < 8 or draws < 1 or not all(each > 0 for each in deviations):
        raise ValueError(
            f"frequency_channel: expected images of 8 pixels and more, draws and deviations above 0, got {height} x "
            f"{width}, {draws=} and {deviations=}"
        )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, height, width, generator=generator, dtype=torch.float64)
    bands = octaves(width)
    rows = [model(image).double().softmax(-1)[0, target]]
    for deviation in deviations:
        for band in bands.tolist():
            added = deviation * band_noise(noise, band)
            added = (added[:, None] / std.double().view(1, -1, 1, 1)).to(image)
            rows.append(model(image + added).double().softmax(-1)[:, target].mean())
    clean, *noisy = rows
    table = torch.stack(noisy).unflatten(0, (len(deviations), len(bands))).cpu()
    return FrequencyChannel(bands, torch.tensor(deviations, dtype=torch.float64), table, float(clean))


def octaves(width: int) -> Tensor:
    """Return the centers of the octaves of an image of this width, in cycles per width, the last at width / 2."""
    found = [width / 2]
    while found[-1] / 2 >= 1:
        found.append(found[-1] / 2)
    return torch.tensor(found[::-1], dtype=torch.float64)


def band_noise(noise: Tensor, band: float) -> Tensor:
    """Keep an octave around `band` (cycles per width) of noise [N, H, W], and give each of deviation 1."""
    height, width = noise.shape[1:]
    down = torch.fft.fftfreq(height, 1 / width, dtype=torch.float64)  # in cycles per width, as across
    across = torch.fft.rfftfreq(width, 1 / width, dtype=torch.float64)
    square = down[:, None].square() + across.square()
    within = (square >= band**2 / 2) & (square < band**2 * 2)
    kept = torch.fft.irfft2(torch.fft.rfft2(noise) * within, s=(height, width))
    return kept / kept.std((1, 2), keepdim=True, unbiased=False)


def attention_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the Attention-IoU of maps with masks, or with other maps: from 0, no overlap, to 1, the same.

    Both are scaled to a sum of 1; the sum of their products is divided by that of the squares of their means (Serianni,
    Zhu, Russakovsky and Ramaswamy, CVPR 2025, arXiv:2503.19846). Facts from
    https://github.com/aaronserianni/attention-iou at e13cde0 (MIT), `element_wise_score` of bias_scorer.py.

    Args:
        maps: [B, H, W], not negative, as a class activation map is.
        masks: [B, H, W], not negative: of a feature (1 where it is), or maps of another class.

    Returns:
        [B] in the wider dtype of both.

    Raises:
        ValueError: if shapes differ, numbers are negative, or a map or mask is zero everywhere.

    >>> attention_iou(torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
    tensor([0.8000])
    """
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f"attention_iou: expected maps and masks [B, H, W] of one shape, got {tuple(maps.shape)} and "
            f"{tuple(masks.shape)}; resize one of them"
        )
    shares = []
    for what, values in (("maps", maps), ("masks", masks)):
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        total = values.sum((1, 2), keepdim=True)
        if bool((values < 0).any()) or not bool((total > 0).all()):
            raise ValueError(f"attention_iou: {what} must hold no negative numbers and more than zeros each")
        shares.append(values / total)
    one, other = shares
    return (one * other).sum((1, 2)) / ((one + other) / 2).square().sum((1, 2))
