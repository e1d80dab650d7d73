"""Whether files, annotations, classes and heads agree, before the first step: a summary of each split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from PIL import Image

from visionzoo.engine.errors import UserError
from visionzoo.engine.images import UNREADABLE
from visionzoo.openmmlab.coco import check_coco
from visionzoo.openmmlab.configuring import LOADERS, class_names, datasets, format_only, heads, own_classes
from visionzoo.openmmlab.masks import check_masks
from visionzoo.text import count_of, some

IMAGES_OPENED = 500  # of each split, for their headers
ORIENTATION = 0x0112  # EXIF's tag


def check_data(cfg: Config, loaders: Sequence[str] = LOADERS) -> list[str]:
    """Compare files, annotations, class names and the heads' numbers of classes.

    Returns:
        A summary of each split, images used and boxes or pixels of each class; then what is worth saying, though
        training can continue.

    Raises:
        UserError: if something is missing, they disagree, or nothing is left of a split; with both lists.
    """
    lines: list[str] = []
    for loader, dataset in datasets(cfg):
        if loader not in loaders:
            continue
        classes = class_names(dataset, cfg)
        if classes is None:
            continue  # a dataset that keeps its classes in files of its own
        for head in heads(cfg):
            if head["num_classes"] != len(classes) and not _is_class_agnostic(head):
                raise UserError(
                    f"{loader} has {count_of(len(classes), 'class')}, {head.get('type', 'a head')} num_classes="
                    f"{head['num_classes']}: {some(classes, 100)}. Set both at once by --classes, or --dataset."
                )
        annotated = not format_only(cfg, loader)
        if dataset["type"].rpartition(".")[2] == "CocoDataset":
            found, images = check_coco(loader, dataset, classes, annotated=annotated)
        elif "seg_map_path" in dataset.get("data_prefix", {}):
            found, images = check_masks(loader, dataset, classes, own_classes(dataset, cfg), annotated=annotated)
        else:
            continue
        lines += found + _check_headers(cfg, loader, dataset, images)
    if "train_dataloader" in loaders:
        _check_single_class(cfg)
    return list(dict.fromkeys(lines))


def _check_single_class(cfg: Config) -> None:
    """Refuse a softmax over one channel: it is 1 everywhere, the loss 0, and nothing is ever learned."""
    for head in heads(cfg):
        losses = head.get("loss_decode")
        if losses is None or head["num_classes"] != 1:
            continue
        parts = [losses] if isinstance(losses, Mapping) else losses
        if not any(loss.get("use_sigmoid") for loss in parts):
            raise UserError(
                f"{head.get('type', 'a head')} has one class under a softmax, which is 1 everywhere: nothing would be "
                f"learned. Name the background as a class too, or decide by a threshold: "
                f"model.decode_head.num_classes=2 out_channels=1 threshold=0.5 loss_decode.use_sigmoid=True"
            )


def _check_headers(cfg: Config, loader: str, dataset: Mapping[str, Any], images: Sequence[Path]) -> list[str]:
    """Open a sample of images: which are turned or narrowed to 8 bits as they are read."""
    sample = images[:: max(1, len(images) // IMAGES_OPENED)][:IMAGES_OPENED]
    turned, deep, sizes = [], [], set()
    for path in sample:
        try:
            with Image.open(path) as image:
                sizes.add(image.size)
                if image.getexif().get(ORIENTATION, 1) not in (0, 1):
                    turned.append(str(path))
                if image.mode[0] in "IF":
                    deep.append(str(path))
        except UNREADABLE:
            continue  # training names it, or skips it
    _check_batch(cfg, loader, dataset, sizes)
    of = f"of {count_of(len(sample), 'image')} opened"
    notes = []
    ignoring = any("ignore_orientation" in str(step.get("color_type", "")) for step in dataset.get("pipeline", []))
    if turned and not ignoring:
        notes.append(
            f"{loader}: {len(turned)} {of} with an EXIF orientation, by which OpenCV turns them as it reads them; "
            f"annotations must be those of the turned pictures. For annotations of the stored pixels set "
            f"color_type='color_ignore_orientation' of LoadImageFromFile: {some(turned)}"
        )
    if deep:
        notes.append(
            f"{loader}: {len(deep)} {of} with more than 8 bits a channel, of which OpenCV keeps 8: {some(deep)}"
        )
    return notes


def _check_batch(cfg: Config, loader: str, dataset: Mapping[str, Any], sizes: set[tuple[int, int]]) -> None:
    """Refuse batches of evaluation whose images mmseg does not bring to one size."""
    if loader == "train_dataloader" or cfg.default_scope != "mmseg" or len(sizes) < 2:
        return
    batch, pipeline = cfg[loader].get("batch_size", 1), dataset.get("pipeline", [])
    one_size = any(step["type"] == "Resize" and not step.get("keep_ratio") and "scale" in step for step in pipeline)
    if isinstance(batch, int) and batch > 1 and not one_size and not cfg.model.data_preprocessor.get("test_cfg"):
        raise UserError(
            f"{loader}: images have different sizes, such as {' and '.join(map(str, sorted(sizes)[:2]))} (width, "
            f"height), and do not fit into one batch: set {loader}.batch_size=1, or model.data_preprocessor.test_cfg, "
            f"such as {{'size_divisor': 32}}"
        )


def _is_class_agnostic(head: Mapping[str, Any]) -> bool:
    return head.get("num_classes") == 1  # such as a region proposal head
