"""Images and masks that training cannot use stop it by name, at the step that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.dataset import BaseDataset, Compose
from mmengine.runner import Runner
from PIL import Image

from visionzoo.engine.errors import UnreadableImageError
from visionzoo.engine.images import UNREADABLE
from visionzoo.openmmlab.data import labels_above_8_bits


class CheckingRunner(Runner):
    """mmengine's Runner, whose data sets name the file that they cannot use."""

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> Any:
        """Build what mmengine does, with pipelines that check."""
        loader = Runner.build_dataloader(*args, **kwargs)
        waiting = [loader.dataset]
        while waiting:
            dataset: Any = waiting.pop()
            if isinstance(dataset, BaseDataset):
                dataset.pipeline = CheckingPipeline(dataset)
            elif hasattr(dataset, "datasets"):  # ConcatDataset
                waiting += dataset.datasets
            elif hasattr(dataset, "dataset"):  # RepeatDataset and others
                waiting.append(dataset.dataset)
        return loader


class CheckingPipeline(Compose):
    """The pipeline of a data set, which compares what was read with what is annotated.

    mmcv's errors of reading do not always name the file; a mask of another size, or a class number out of range, would
    be told by a later step in words of its own, on a GPU by the end of the process.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset.pipeline.transforms)
        # mmdet numbers classes itself, mmseg takes the numbers of the masks
        classes = dataset.metainfo.get("classes") if hasattr(dataset, "reduce_zero_label") else None
        self.num_classes = classes and len(classes)
        self.ignore_index = getattr(dataset, "ignore_index", 255)

    def __call__(self, data: Any) -> Any:
        """Apply the transforms in turn; None if one of them gives None.

        Raises:
            UnreadableImageError: a file cannot be read, or is not what its annotations are for.
        """
        image, mask = data.get("img_path"), data.get("seg_map_path")
        for transform in self.transforms:
            if isinstance(transform, LoadImageFromFile):
                data = _read(transform, data, image)
                self._check_image(data, image)
            elif isinstance(transform, LoadAnnotations):
                data = _read(transform, data, mask or image)
                self._check_mask(data, mask)
            else:
                data = transform(data)
            if data is None:
                return None
        return data

    def _check_image(self, data: Any, path: Any) -> None:
        if data is None or "height" not in data or "width" not in data:
            return
        annotated = (data["height"], data["width"])
        if tuple(data["ori_shape"]) != annotated:
            raise _unusable(
                path,
                f"it has {_pixels(data['ori_shape'])}, by its annotations {_pixels(annotated)} (OpenCV turns "
                f"images as their EXIF orientation says)",
            )

    def _check_mask(self, data: Any, path: Any) -> None:
        labels = None if data is None else data.get("gt_seg_map")
        if labels is None:
            return
        if labels.shape != tuple(data["ori_shape"]):
            raise _unusable(path, f"the mask has the shape {labels.shape}, its image {_pixels(data['ori_shape'])}")
        if path and Path(path).is_file():  # else it is on a server
            with Image.open(path) as mask:
                if mask.mode.startswith("I") and (wider := labels_above_8_bits(np.asarray(mask))):
                    raise _unusable(path, f"the mask {wider}")
        if self.num_classes is not None:
            wrong = np.unique(labels[(labels >= self.num_classes) & (labels != self.ignore_index)])
            if wrong.size:
                raise _unusable(path, f"the mask has the class numbers {wrong.tolist()} of {self.num_classes} classes")


def without_traceback(step: Callable[[], Any]) -> Any:
    """Return what `step` does; a bad file that a loading process met is told without that process's traceback."""
    try:
        return step()
    except UnreadableImageError as error:
        line = str(error).strip().splitlines()[-1]
        raise UnreadableImageError(line.removeprefix("visionzoo.engine.errors.UnreadableImageError: ")) from error


def _read(transform: Callable[[Any], Any], data: Any, path: Any) -> Any:
    try:
        return transform(data)
    except (*UNREADABLE, AssertionError, cv2.error) as error:
        raise _unusable(path, str(error).strip().replace("\n", " ")) from error


def _unusable(path: Any, reason: str) -> UnreadableImageError:
    return UnreadableImageError(
        f"cannot use {path}: {reason}; mend or remove it; training goes on from the last checkpoint by --resume"
    )


def _pixels(shape: Any) -> str:
    return f"a height of {shape[0]} and a width of {shape[1]} pixels"
