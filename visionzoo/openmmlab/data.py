"""One's own data in a config, and whether annotations, classes and heads agree, before the first step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from PIL import Image

from visionzoo.engine.errors import UserError, closest, require

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
UNLABELLED = 255  # in masks; mmseg's ignore_index
MASKS_READ = 50  # of each split

DATASET_KEYS = {
    "detection": ("root", "train", "val", "classes"),
    "segmentation": ("root", "train", "val", "classes", "zero_is_unlabelled", "image_suffix", "mask_suffix"),
}
SPLIT_KEYS = {"detection": ("images", "annotations"), "segmentation": ("images", "masks")}


# -- putting data and classes into a config ---------------------------------------------------------------------------


def use_dataset(cfg: Config, path: str) -> None:
    """Put the data that a YAML file describes in the place of a config's own, and its classes everywhere.

    For detection (annotations in COCO's format; without `classes` those of the training annotations are taken):

        root: /data/pets
        train: {images: train, annotations: train.json}
        val: {images: val, annotations: val.json}
        classes: [cat, dog]

    For segmentation (masks are PNGs of class indices, 255 is unlabelled):

        root: /data/fields
        train: {images: images/training, masks: annotations/training}
        val: {images: images/validation, masks: annotations/validation}
        classes: [soil, crop, weed]
        zero_is_unlabelled: false    # true: 0 is unlabelled, classes count from 1, as in ADE20K
        image_suffix: .jpg
        mask_suffix: .png

    Raises:
        UserError: if the file cannot be read, or has other keys.
    """
    task = task_of(cfg)
    described = _read_description(Path(path), task)
    root = str((Path(path).parent / described["root"]).resolve())
    for loader, dataset in datasets(cfg):
        split = described["train" if loader == "train_dataloader" else "val"]
        dataset.data_root = root
        dataset.pop("metainfo", None)
        if task == "detection":
            dataset.update(type="CocoDataset", ann_file=split["annotations"])
            dataset.data_prefix = ConfigDict(img=split["images"])
        else:
            dataset.update(
                type="BaseSegDataset",
                img_suffix=described.get("image_suffix", ".jpg"),
                seg_map_suffix=described.get("mask_suffix", ".png"),
                reduce_zero_label=bool(described.get("zero_is_unlabelled", False)),
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
    use_classes(cfg, described.get("classes") or _categories(Path(root) / described["train"]["annotations"]))


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
        annotated = _categories(_annotation_file(dataset))
        if set(classes) <= set(annotated):
            classes = [name for name in annotated if name in classes]
    for _, dataset in datasets(cfg):
        dataset.metainfo = ConfigDict(classes=tuple(classes))
    for head in heads(cfg):
        before, head["num_classes"] = head["num_classes"], len(classes)
        for loss in head.values():  # the weight of "no object" comes after those of the classes
            weights = loss.get("class_weight") if isinstance(loss, Mapping) else None
            if isinstance(weights, list | tuple) and len(weights) == before + 1:
                loss["class_weight"] = [1.0] * len(classes) + [weights[-1]]


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


# -- checks -----------------------------------------------------------------------------------------------------------


def check_data(cfg: Config, loaders: Sequence[str] = LOADERS) -> list[str]:
    """Compare files, annotations, class names and the heads' numbers of classes.

    Returns:
        What is worth saying, though training can go on.

    Raises:
        UserError: if something is missing, or they disagree; with both lists.
    """
    notes: list[str] = []
    for loader, dataset in datasets(cfg):
        if loader not in loaders:
            continue
        classes = class_names(dataset, cfg)
        if classes is None:
            continue  # a dataset that keeps its classes in files of its own
        for head in heads(cfg):
            if head["num_classes"] != len(classes) and not _is_class_agnostic(head):
                raise UserError(
                    f"{loader} has {len(classes)} classes, {head.get('type', 'a head')} num_classes="
                    f"{head['num_classes']}: {_listed(classes)}. Set both at once by --classes, or --dataset."
                )
        if dataset["type"].rpartition(".")[2] == "CocoDataset":
            notes += _check_coco(loader, dataset, classes)
        elif "seg_map_path" in dataset.get("data_prefix", {}):
            _check_masks(loader, dataset, classes)
    return list(dict.fromkeys(notes))


def class_names(dataset: Mapping[str, Any], cfg: Config) -> list[str] | None:
    """Return the classes of a dataset: those of its config, else of its kind."""
    if classes := (dataset.get("metainfo") or {}).get("classes"):
        return list(classes)
    from mmengine.registry import DATASETS, init_default_scope

    init_default_scope(cfg.default_scope)
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
        kind: Any = registry.get(dataset["type"])
    if kind is None:
        raise UserError(f"no dataset type {dataset['type']!r}{closest(dataset['type'], registry.module_dict)}")
    classes = kind.METAINFO.get("classes")
    return None if classes is None else list(classes)


def _check_coco(loader: str, dataset: Mapping[str, Any], classes: list[str]) -> list[str]:
    path = _annotation_file(dataset)
    content = _read_coco(path)
    annotated = [category["name"] for category in content["categories"]]
    missing = [name for name in classes if name not in annotated]
    both = f"\n  classes of the config: {_listed(classes)}\n  categories of {path}: {_listed(annotated)}"
    if missing:
        raise UserError(
            f"{loader}: {len(missing)} of {len(classes)} classes are not among the annotated categories "
            f"({_listed(missing)}); they would never be learnt, or all of AP be 0.{both}\nName your classes by "
            f"--classes a,b,c, or give the data by --dataset FILE.yaml."
        )
    if [name for name in annotated if name in classes] != classes:
        raise UserError(
            f"{loader}: classes and annotated categories are in different order, and mmdet numbers them in that of the "
            f"file: predictions would have wrong names.{both}"
        )
    folder = Path(dataset.get("data_root") or "", dataset["data_prefix"]["img"])
    _require_files(loader, [folder / image["file_name"] for image in content["images"][:20]], "images")
    used = {category["id"] for category in content["categories"] if category["name"] in classes}
    count = sum(annotation["category_id"] in used for annotation in content["annotations"])
    if not count:
        raise UserError(f"{loader}: {path} has no annotation of any class.{both}")
    left_out = [name for name in annotated if name not in classes]
    return [f"{loader}: categories of {path} that are not used: {_listed(left_out)}"] if left_out else []


def _check_masks(loader: str, dataset: Mapping[str, Any], classes: list[str]) -> None:
    root, prefix = Path(dataset.get("data_root") or ""), dataset["data_prefix"]
    from_zero = not _reduces_zero(dataset)
    image_suffix, mask_suffix = dataset.get("img_suffix", ".jpg"), dataset.get("seg_map_suffix", ".png")
    images = sorted((root / prefix["img_path"]).glob(f"*{image_suffix}"))
    if not images:
        raise UserError(f"{loader}: no images *{image_suffix} in {root / prefix['img_path']}")
    masks = [root / prefix["seg_map_path"] / (image.name[: -len(image_suffix)] + mask_suffix) for image in images]
    _require_files(loader, masks, "masks")
    allowed = set(range(len(classes))) if from_zero else set(range(len(classes) + 1))
    for path in masks[:: max(1, len(masks) // MASKS_READ)][:MASKS_READ]:
        found = set(np.unique(np.array(Image.open(path))).tolist())
        if wrong := found - allowed - {UNLABELLED}:
            start = "0 is unlabelled, classes count from 1" if not from_zero else "classes count from 0"
            raise UserError(
                f"{loader}: {path} has the values {sorted(wrong)}, but there are {len(classes)} classes and {start}, "
                f"so 0 to {max(allowed)}, and {UNLABELLED} for unlabelled, were expected.\n"
                f"  values of the mask: {sorted(found)}\n  classes: {_listed(classes)}"
            )


def _reduces_zero(dataset: Mapping[str, Any]) -> bool:
    """Whether 0 is unlabelled: mmseg reads it from the pipeline's transform."""
    for transform in dataset.get("pipeline", []):
        if transform["type"] == "LoadAnnotations" and transform.get("reduce_zero_label") is not None:
            return bool(transform["reduce_zero_label"])
    return bool(dataset.get("reduce_zero_label", dataset["type"].rpartition(".")[2] == "ADE20KDataset"))


def _require_files(loader: str, paths: Sequence[Path], what: str) -> None:
    absent = [path for path in paths if not path.exists()]
    if absent:
        raise UserError(f"{loader}: {len(absent)} {what} are missing, the first is {absent[0]}")


def _is_class_agnostic(head: Mapping[str, Any]) -> bool:
    return head.get("num_classes") == 1  # such as a region proposal head


def _annotation_file(dataset: Mapping[str, Any]) -> Path:
    return Path(dataset.get("data_root") or "", dataset["ann_file"])


def _categories(path: Path) -> list[str]:
    return [category["name"] for category in _read_coco(path)["categories"]]


def _read_coco(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"no annotations at {path}. Give the folder of the data by --data-root, or your own by --dataset FILE. "
            f"tools/check_data.py says what a folder of COCO or ADE20K lacks."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise UserError(f"{path} is not in COCO's format: expected an object with the lists {', '.join(lists)}")
    for key, wanted in (("images", ("id", "file_name", "height", "width")),
                        ("annotations", ("id", "image_id", "category_id", "bbox", "area")),
                        ("categories", ("id", "name"))):  # fmt: skip
        for entry in content[key]:
            if absent := [name for name in wanted if name not in entry]:
                raise UserError(f"{path}: an entry of {key} lacks {', '.join(absent)}: {str(entry)[:200]}")
    return content


def _read_description(path: Path, task: str) -> dict[str, Any]:
    yaml = require("yaml")
    try:
        described = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the dataset {path}: {error}") from error
    if not isinstance(described, dict):
        raise UserError(f"{path}: expected keys and values ({', '.join(DATASET_KEYS[task])}), got {described!r}")
    for name in described:
        if name not in DATASET_KEYS[task]:
            raise UserError(f"{path}: unknown key {name!r} for {task}{closest(str(name), DATASET_KEYS[task])}")
    described.setdefault("root", ".")
    for split in ("train", "val"):
        if set(described.get(split) or {}) != set(SPLIT_KEYS[task]):
            raise UserError(
                f"{path}: expected {split}: {{{', '.join(f'{key}: PATH' for key in SPLIT_KEYS[task])}}} for {task}, "
                f"got {described.get(split)!r}"
            )
    if task == "segmentation" and not described.get("classes"):
        raise UserError(f"{path}: expected classes: [...], the names in the order of the masks' values")
    return described


def _listed(names: Sequence[str], most: int = 100) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
