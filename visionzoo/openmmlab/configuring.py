"""Data and classes put into a config, and where a config keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from visionzoo.engine.errors import UserError, closest
from visionzoo.openmmlab.coco import annotation_file, category_names
from visionzoo.openmmlab.description import read_description

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def use_dataset(cfg: Config, path: str) -> None:
    """Put the data that a YAML file describes into a config instead of its own, and its classes everywhere.

    For detection (annotations in COCO's format; without `classes` those of the training annotations are taken):

        root: /data/pets
        train: {images: train, annotations: train.json}
        val: {images: val, annotations: val.json}
        classes: [cat, dog]
        background_images: true      # learn from images without boxes too (default: the config's choice)
        min_image_size: 0            # pixels; smaller images are left out of training (default: the config's choice)

    For segmentation (masks are PNGs of class indices, 255 is unlabeled):

        root: /data/fields
        train: {images: images/training, masks: annotations/training}
        val: {images: images/validation, masks: annotations/validation}
        classes: [soil, crop, weed]
        zero_is_unlabeled: false    # true: 0 is unlabeled, classes count from 1, as in ADE20K
        image_suffix: .jpg
        mask_suffix: .png

    Raises:
        UserError: if the file cannot be read, or has other keys.
    """
    task = task_of(cfg)
    described = read_description(Path(path), task)
    root = str((Path(path).parent / described["root"]).resolve())
    for loader, dataset in datasets(cfg):
        split = described["train" if loader == "train_dataloader" else "val"]
        dataset.data_root = root
        dataset.pop("metainfo", None)
        if task == "detection":
            dataset.update(type="CocoDataset", ann_file=split["annotations"])
            dataset.data_prefix = ConfigDict(img=split["images"])
            if loader == "train_dataloader":
                _choose_images(dataset, described)
        else:
            dataset.update(
                type="BaseSegDataset",
                img_suffix=described.get("image_suffix", ".jpg"),
                seg_map_suffix=described.get("mask_suffix", ".png"),
                reduce_zero_label=bool(described.get("zero_is_unlabeled", False)),
            )
            dataset.data_prefix = ConfigDict(img_path=split["images"], seg_map_path=split["masks"])
            for transform in dataset.pipeline:
                if transform["type"] == "LoadAnnotations":
                    transform["reduce_zero_label"] = dataset.reduce_zero_label
    if task == "detection":
        annotations = str(Path(root) / described["val"]["annotations"])
        for metric in metrics(cfg):
            if "ann_file" in metric:
                metric["ann_file"] = annotations
    use_classes(cfg, described.get("classes") or category_names(Path(root) / described["train"]["annotations"]))


def _choose_images(dataset: ConfigDict, described: Mapping[str, Any]) -> None:
    choice = dict(dataset.get("filter_cfg") or {})
    if "background_images" in described:
        choice["filter_empty_gt"] = not described["background_images"]
    if "min_image_size" in described:
        choice["min_size"] = described["min_image_size"]
    if choice:
        dataset.filter_cfg = ConfigDict(choice)


def use_root(cfg: Config, root: str) -> None:
    """Let a config read its data from another folder of the same layout."""
    before = {dataset.get("data_root") for _, dataset in datasets(cfg)}
    for _, dataset in datasets(cfg):
        dataset.data_root = root
    for metric in metrics(cfg):
        for old in before:
            if old and str(metric.get("ann_file", "")).startswith(old):
                metric["ann_file"] = str(Path(root) / metric["ann_file"][len(old) :].lstrip("/"))


def use_classes(cfg: Config, classes: Sequence[str]) -> None:
    """Set the names in all datasets and the number in all heads.

    mmdet numbers classes in the order of the annotation file, whatever the order of the names; so do we.
    """
    classes = [str(name) for name in classes]
    if len(set(classes)) < len(classes) or not classes:
        raise UserError(f"expected different class names, got {classes}")
    if task_of(cfg) == "detection":
        dataset = next(dataset for _, dataset in datasets(cfg))
        annotated = category_names(annotation_file(dataset))
        if set(classes) <= set(annotated):
            classes = [name for name in annotated if name in classes]
    for _, dataset in datasets(cfg):
        dataset.metainfo = ConfigDict(classes=tuple(classes))
    for head in heads(cfg):
        before, head["num_classes"] = head["num_classes"], len(classes)
        losses = [loss for part in head.values() for loss in (part if isinstance(part, list | tuple) else [part])]
        for loss in losses:
            weights = loss.get("class_weight") if isinstance(loss, Mapping) else None
            # weights of other classes mean nothing; that of "no object" comes after them
            if isinstance(weights, list | tuple) and before != len(classes) and len(weights) in (before, before + 1):
                loss["class_weight"] = [1.0] * len(classes) + list(weights[before:])


def task_of(cfg: Config) -> str:
    """Return "detection" for a config of mmdet, "segmentation" for one of mmseg."""
    scope = cfg.get("default_scope")
    if scope not in ("mmdet", "mmseg"):
        raise UserError(f"{cfg.filename}: expected default_scope 'mmdet' or 'mmseg', got {scope!r}")
    return "detection" if scope == "mmdet" else "segmentation"


def datasets(cfg: Config) -> Iterator[tuple[str, ConfigDict]]:
    """Return the datasets of all loaders, taken out of wrappers such as RepeatDataset, with the loader's name."""
    for loader in LOADERS:
        waiting = [cfg[loader]["dataset"]] if cfg.get(loader) else []
        while waiting:
            dataset = waiting.pop()
            inner = dataset.get("dataset") or dataset.get("datasets")
            if inner:
                waiting += inner if isinstance(inner, list) else [inner]
            else:
                yield loader, dataset


def metrics(cfg: Config) -> Iterator[ConfigDict]:
    """Return the metrics of validation and test."""
    for name in ("val_evaluator", "test_evaluator"):
        evaluator: Any = cfg.get(name) or []
        yield from [evaluator] if isinstance(evaluator, Mapping) else evaluator


def heads(cfg: Config) -> Iterator[ConfigDict]:
    """Return all parts of the model that have a number of classes."""
    waiting = [value for name, value in cfg.model.items() if name != "backbone"]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            if "num_classes" in part:
                yield part
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part


def class_names(dataset: Mapping[str, Any], cfg: Config) -> list[str] | None:
    """Return the classes of a dataset: those of its config, else of its kind."""
    if classes := (dataset.get("metainfo") or {}).get("classes"):
        return list(classes)
    return own_classes(dataset, cfg)


def own_classes(dataset: Mapping[str, Any], cfg: Config) -> list[str] | None:
    """Return the classes that a kind of data set has by itself.

    Raises:
        UserError: there is no such kind.
    """
    from mmengine.registry import DATASETS, init_default_scope

    init_default_scope(cfg.default_scope)
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
        kind: Any = registry.get(dataset["type"])
    if kind is None:
        raise UserError(f"no dataset type {dataset['type']!r}{closest(dataset['type'], registry.module_dict)}")
    classes = kind.METAINFO.get("classes")
    return None if classes is None else list(classes)


def config_classes(cfg: Config) -> list[str] | None:
    """Return the classes of a config's data, those of evaluation first; None where it names none."""
    found = {loader: names for loader, dataset in datasets(cfg) if (names := class_names(dataset, cfg))}
    return next((found[loader] for loader in reversed(LOADERS) if loader in found), None)


def format_only(cfg: Config, loader: str) -> bool:
    """Whether a loader's results are written for a test server, without being compared with annotations."""
    evaluator: Any = cfg.get(loader.replace("dataloader", "evaluator")) or []
    parts = [evaluator] if isinstance(evaluator, Mapping) else evaluator
    return loader != "train_dataloader" and bool(parts) and all(part.get("format_only") for part in parts)
