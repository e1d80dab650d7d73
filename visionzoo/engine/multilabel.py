"""Images with any number of labels each, from a table: `--multi-label`.

Each split is a folder with images, in any folders below it, and `labels.csv`: a header `image,labels`, then for each
image its path within the split and its labels with `;` between them, nothing where it has none.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from PIL import Image
from timm.loss import BinaryCrossEntropy
from torch import Tensor
from torch.utils.data import Dataset

from visionzoo.engine.errors import UserError, require
from visionzoo.text import count_of, some

TABLE = "labels.csv"


class MultiLabelImages(Dataset):
    """The images of a split as (picture, one 0 or 1 for each class).

    Args:
        folder: with `labels.csv`.
        class_to_idx: class names and their numbers; None for those of the table, in alphabetical order.

    Raises:
        UserError: the table is not there or is not such a table, or it has labels that `class_to_idx` has not.
    """

    def __init__(self, folder: Path, class_to_idx: Mapping[str, int] | None = None) -> None:
        self.folder = folder
        self.samples = _read_table(folder / TABLE)
        found = {label for _, labels in self.samples for label in labels}
        self.class_to_idx = dict(class_to_idx or {name: number for number, name in enumerate(sorted(found))})
        if strangers := sorted(found - set(self.class_to_idx)):
            raise UserError(
                f"{folder / TABLE}: labels that were not trained on: {some(strangers)}; the training had "
                f"{some(self.class_to_idx)}"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        name, labels = self.samples[index]
        present = {self.class_to_idx[label] for label in labels}
        with Image.open(self.folder / name) as image:
            image.load()
        return image, np.array([int(number in present) for number in range(len(self.class_to_idx))])

    def filename(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.folder / self.samples[index][0])


def _read_table(path: Path) -> list[tuple[str, list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--multi-label needs a table of labels in the split's folder: {path}: {error}") from error
    if not rows or not {"image", "labels"} <= set(rows[0]):
        raise UserError(f"{path}: expected a header `image,labels` and a row for each image, got {list(rows[:1])}")
    samples = [(row["image"], [label.strip() for label in (row["labels"] or "").split(";")]) for row in rows]
    names = [name for name, _ in samples]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise UserError(f"{path}: {count_of(len(missing), 'image is', 'images are')} not there, such as {missing[0]}")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: an image is listed twice: {next(name for name in names if names.count(name) > 1)}")
    return [(name, [label for label in labels if label]) for name, labels in samples]


class MultiLabelLoss(BinaryCrossEntropy):
    """timm's binary cross-entropy on targets that are whole numbers."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Loss of [B, C] logits against [B, C] zeros and ones."""
        return super().forward(x, target.to(x.dtype))


def mean_average_precision(logits: Tensor, targets: Tensor, distributed: bool) -> float:
    """Return the average precision in percent, averaged over the classes that occur.

    Args:
        logits: [N, C] of this process's images.
        targets: [N, C] of zeros and ones.
        distributed: whether those of all processes are joined.

    Raises:
        UserError: no label occurs.
    """
    if distributed:
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (logits.cpu(), targets.cpu()))
        logits, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    occurring = targets.any(0)
    if not occurring.any():
        raise UserError("none of the images evaluated on has a label, so there is no average precision")
    precision = require("sklearn.metrics").average_precision_score
    return 100 * float(precision(targets[:, occurring].cpu().numpy(), logits[:, occurring].float().cpu().numpy()))
