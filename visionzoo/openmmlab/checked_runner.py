"""Images and masks that cannot be used stop training by name, at the step that reads them, or are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.dataset import BaseDataset, Compose
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from PIL import Image

from visionzoo.engine.errors import UnreadableImageError
from visionzoo.engine.images import UNREADABLE
from visionzoo.engine.interruption import outlive_signals
from visionzoo.openmmlab.console import shorten
from visionzoo.openmmlab.losses import allow_unlabelled_batches
from visionzoo.openmmlab.masks import labels_beyond_8_bits
from visionzoo.openmmlab.stopping import GoingOnTrainLoop
from visionzoo.text import count_of


class CheckingRunner(Runner):
    """mmengine's Runner, whose data sets name the file that they cannot use."""

    def build_logger(self, log_level: Any = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """Build what mmengine does; the terminal has the name of the file instead of the pages in it."""
        path = log_file or str(Path(self._log_dir) / f"{self.timestamp}.log")
        logger = super().build_logger(log_level, path, **kwargs)
        shorten(logger, path)
        return logger

    def build_model(self, model: Any) -> Any:
        """Build what mmengine does, with losses that take batches without a labeled pixel."""
        built = super().build_model(model)
        allow_unlabelled_batches(built)
        return built

    def build_dataloader(self, dataloader: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # static in mmengine
        """Build what mmengine does, with pipelines that check and loading processes that a signal to all outlive."""
        loader = Runner.build_dataloader(dataloader, **kwargs)
        loader.worker_init_fn = partial(_begin_loading, loader.worker_init_fn)
        skip_bad = bool(self.cfg.get("skip_bad_images")) and dataloader is self._train_dataloader
        for dataset in _base_datasets(loader):
            dataset.pipeline = CheckingPipeline(dataset, skip_bad=skip_bad)
        return loader

    def build_train_loop(self, loop: Any) -> Any:
        """Build what mmengine does; over epochs, one that continues in the middle of an epoch."""
        built = super().build_train_loop(loop)
        if type(built) is EpochBasedTrainLoop:
            built.__class__ = GoingOnTrainLoop  # it has no attributes of its own, and the config names mmengine's
        return built

    def build_evaluator(self, evaluator: Any) -> Any:
        """Build what mmengine does; number annotations from 1, as COCO's metric takes id 0 for none."""
        built = Runner.build_evaluator(self, evaluator)
        for metric in built.metrics:
            coco = getattr(metric, "_coco_api", None)
            if coco is not None and any(type(key) is not int or key < 1 for key in coco.anns):
                for number, annotation in enumerate(coco.dataset["annotations"], 1):
                    annotation["id"] = number
                coco.createIndex()
        return built


def _base_datasets(loader: Any) -> Iterator[BaseDataset]:
    waiting = [loader.dataset]
    while waiting:
        dataset: Any = waiting.pop()
        if isinstance(dataset, BaseDataset):
            yield dataset
        elif hasattr(dataset, "datasets"):  # ConcatDataset
            waiting += dataset.datasets
        elif hasattr(dataset, "dataset"):  # RepeatDataset and others
            waiting.append(dataset.dataset)


class CheckingPipeline(Compose):
    """The pipeline of a data set, which compares what was read with what is annotated.

    mmcv's errors of reading do not always name the file; a mask of another size, or a class number out of range, would
    surface in a later step in other words, on a GPU by the end of the process.

    Args:
        dataset: whose pipeline this is.
        skip_bad: give None for files that cannot be used, for which mmengine then takes others at random.

    Attributes:
        bad: [N], which of the data set's N images were skipped so far, by any loading process.
    """

    def __init__(self, dataset: Any, *, skip_bad: bool = False) -> None:
        super().__init__(dataset.pipeline.transforms)
        # mmdet numbers classes itself, mmseg takes the numbers of the masks
        classes = dataset.metainfo.get("classes") if hasattr(dataset, "reduce_zero_label") else None
        self.num_classes = classes and len(classes)
        self.ignore_index = getattr(dataset, "ignore_index", 255)
        self.skip_bad = skip_bad
        self.bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __call__(self, data: Any) -> Any:
        """Apply the transforms in turn; None if one of them gives None, or for a bad file that is skipped.

        Raises:
            UnreadableImageError: a file cannot be read, or is not what its annotations are for.
        """
        index = data["sample_idx"]
        try:
            return self._apply(data)
        except UnreadableImageError:
            self.bad[index] = True
            if not self.skip_bad or self.bad.all():
                raise
            return None

    def _apply(self, data: Any) -> Any:
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
                if mask.mode[0] in "IF" and (wider := labels_beyond_8_bits(np.asarray(mask))):
                    raise _unusable(path, f"the mask {wider}")
        if self.num_classes is not None:
            wrong = np.unique(labels[(labels >= self.num_classes) & (labels != self.ignore_index)])
            if wrong.size:
                raise _unusable(
                    path, f"the mask has the class numbers {wrong.tolist()} of {count_of(self.num_classes, 'class')}"
                )


@HOOKS.register_module()
class SkippedImagesHook(Hook):
    """Logs which training images were skipped, by any process, before each validation and at the end.

    mmengine leaves out a warning that it has given in the same words.
    """

    def before_val_epoch(self, runner: Runner) -> None:
        """Log those so far."""
        self.after_train(runner)

    def after_train(self, runner: Runner) -> None:
        """Log those so far."""
        for dataset in _base_datasets(runner.train_dataloader):
            bad = dataset.pipeline.bad.int()
            all_reduce(bad, op="max")
            names = [dataset.get_data_info(int(index))["img_path"] for index in bad.nonzero()]
            if names:
                runner.logger.warning(
                    f"{count_of(len(names), 'training image was', 'training images were')} skipped: {', '.join(names)}"
                )


def without_traceback(step: Callable[[], Any]) -> Any:
    """Return what `step` does; a bad file that a loading process met is reported without that process's traceback."""
    try:
        return step()
    except UnreadableImageError as error:
        line = str(error).strip().splitlines()[-1]
        raise UnreadableImageError(line.removeprefix("visionzoo.engine.errors.UnreadableImageError: ")) from error


def _begin_loading(begin: Callable[[int], None] | None, number: int) -> None:
    """Begin a loading process; `begin` is mmengine's function for it, or the config's."""
    outlive_signals()
    if begin is not None:
        begin(number)


def _read(transform: Callable[[Any], Any], data: Any, path: Any) -> Any:
    try:
        return transform(data)
    except (*UNREADABLE, AssertionError, cv2.error) as error:
        raise _unusable(path, str(error).strip().replace("\n", " ")) from error


def _unusable(path: Any, reason: str) -> UnreadableImageError:
    return UnreadableImageError(
        f"cannot use {path}: {reason}; fix or remove it; training continues from the last checkpoint by --resume, and "
        f"skips such files with --skip-bad-images"
    )


def _pixels(shape: Any) -> str:
    return f"a height of {shape[0]} and a width of {shape[1]} pixels"
