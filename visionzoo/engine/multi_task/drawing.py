"""Pictures of a network of several tasks: its curve, and what it answers at each budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from visionzoo.engine.checkpoints import write_atomically
from visionzoo.engine.multi_task.data import UNLABELED, MaskedImages

SHOWN = 4  # images of a sheet


def draw_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the quality of each task against multiply-adds."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("map", "classification: mAP"), ("miou", "segmentation: mIoU")):
        axes.plot([row["mmacs"] for row in rows], [row[key] for row in rows], ".-", label=label)
    axes.set_xlabel("million multiply-adds per image")
    axes.set_ylabel("%")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


@torch.inference_mode()
def draw_sheet(
    path: Path, networks: Mapping[float, nn.Module], images: MaskedImages, names: Sequence[str], device: torch.device
) -> None:
    """Draw the first images of a split: the image, its mask, and at each budget the pixels and the likely labels.

    Args:
        path: of the picture.
        networks: by budget.
        images: the split.
        names: of the classes.
        device: of the networks.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colors = np.concatenate([np.zeros((1, 3)), colormaps["tab20"](np.arange(len(names) - 1) % 20)[:, :3]])
    count = min(SHOWN, len(images))
    figure = Figure(figsize=(1.7 * (2 + len(networks)), 1.95 * count), layout="constrained")
    axes = figure.subplots(count, 2 + len(networks), squeeze=False)
    for number, row in enumerate(axes):
        image, mask = images[number]
        mean, std = (torch.tensor(values)[:, None, None] for values in (images.normalize.mean, images.normalize.std))
        picture = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        shown = [("image", picture), ("mask", _colored(mask.numpy(), colors))]
        for budget, network in networks.items():
            model: Any = network
            answers = model(image[None].to(device))
            sure = answers.labels[0].sigmoid() > 0.5
            found = [names[int(label)] for label in model.label_classes[sure]]
            listed = " ".join(found[:6]) + (" ..." if len(found) > 6 else "")
            shown.append(
                (f"{budget:g}: {listed or 'none'}", _colored(answers.pixels[0].argmax(0).cpu().numpy(), colors))
            )
        for axis, (title, content) in zip(row, shown, strict=True):
            axis.imshow(content)
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=80))


def _colored(mask: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Return a mask [H, W] as a picture [H, W, 3]; what is not labeled is white."""
    known = mask != UNLABELED
    return np.where(known[..., None], colors[np.where(known, mask, 0)], 1.0)
