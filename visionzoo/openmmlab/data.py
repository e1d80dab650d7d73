"""One's own data in a config, and whether annotations, classes and heads agree, before the first step."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.fileio import list_dir_or_file
from PIL import Image

from visionzoo.engine.errors import UserError, closest, require
from visionzoo.engine.images import UNREADABLE

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
            notes += _check_masks(loader, dataset, classes, _own_classes(dataset, cfg))
    return list(dict.fromkeys(notes))


def class_names(dataset: Mapping[str, Any], cfg: Config) -> list[str] | None:
    """Return the classes of a dataset: those of its config, else of its kind."""
    if classes := (dataset.get("metainfo") or {}).get("classes"):
        return list(classes)
    return _own_classes(dataset, cfg)


def _own_classes(dataset: Mapping[str, Any], cfg: Config) -> list[str] | None:
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
    _require_files(loader, [folder / image["file_name"] for image in content["images"]], "images")
    used = {category["id"] for category in content["categories"] if category["name"] in classes}
    images = {image["id"]: image for image in content["images"]}
    annotations = [a for a in content["annotations"] if a["category_id"] in used and a["image_id"] in images]
    if not annotations:
        raise UserError(f"{loader}: {path} has no annotation of any class on any of its images.{both}")
    without_area = [a for a in annotations if not _has_area(a, images[a["image_id"]])]
    evaluated = loader != "train_dataloader"
    if evaluated and (lacking := [str(a["id"]) for a in annotations if "iscrowd" not in a]):
        raise UserError(f'{path}: COCO\'s metric needs "iscrowd": 0 or 1 in annotations: {_listed(lacking, 20)}')
    if _loads_masks(dataset):
        _check_polygons(path, [a for a in annotations if evaluated or _has_area(a, images[a["image_id"]])])
    left_out = {
        "categories that are not used": [name for name in annotated if name not in classes],
        "annotations of images that it does not list": [
            str(a["id"]) for a in content["annotations"] if a["image_id"] not in images
        ],
        "boxes that are left out, as they are outside of their image or smaller than a pixel,": [
            str(a["id"]) for a in without_area
        ],
    }
    return [
        f"{loader}: {len(which)} {what} in {path}: {_listed(which, 20)}" for what, which in left_out.items() if which
    ]


def _has_area(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> bool:
    """Whether mmdet keeps the box."""
    x, y, width, height = annotation["bbox"]
    inside = min(x + width, image["width"]) > max(x, 0) and min(y + height, image["height"]) > max(y, 0)
    return inside and width >= 1 and height >= 1 and annotation["area"] > 0


def _loads_masks(dataset: Mapping[str, Any]) -> bool:
    return any(transform.get("with_mask") for transform in dataset.get("pipeline", []))


def _check_polygons(path: Path, annotations: Sequence[Mapping[str, Any]]) -> None:
    if without := [str(a["id"]) for a in annotations if not a.get("segmentation")]:
        raise UserError(
            f"{path}: {len(without)} of {len(annotations)} annotations have no segmentation, and this detector learns "
            f"masks: {_listed(without, 20)}. Add polygons, or take a detector of boxes alone, such as RetinaNet."
        )


def _check_masks(
    loader: str, dataset: Mapping[str, Any], classes: list[str], own_classes: list[str] | None
) -> list[str]:
    if own_classes and not set(classes) <= set(own_classes):
        raise UserError(
            f"{loader}: {dataset['type']} has classes of its own, {_listed(own_classes, 10)}; others than these "
            f"({_listed([name for name in classes if name not in own_classes], 10)}) need --dataset FILE.yaml."
        )
    root, prefix = Path(dataset.get("data_root") or ""), dataset["data_prefix"]
    image_folder, mask_folder = root / prefix["img_path"], root / prefix["seg_map_path"]
    image_suffix, mask_suffix = dataset.get("img_suffix", ".jpg"), dataset.get("seg_map_suffix", ".png")
    listed = Path(root, dataset.get("ann_file") or "")
    if listed.is_file():
        names = [line.strip() for line in listed.read_text().splitlines()]
        _require_files(loader, [image_folder / (name + image_suffix) for name in names], "images")
    else:
        found = _files(image_folder)
        names = [file[: -len(image_suffix)] for file in found if file.endswith(image_suffix)]
        if not names:
            others = sorted({Path(file).suffix for file in found})
            raise UserError(
                f"{loader}: no images *{image_suffix} in {image_folder}; there are "
                f"{f'files {_listed(others)}: name their ending by image_suffix' if others else 'no files'}"
            )
    masks = [mask_folder / (name + mask_suffix) for name in names]
    _require_files(loader, masks, "masks")
    values = own_classes or classes  # mmseg maps a data set's own classes to those that are wanted
    from_zero = not _reduces_zero(dataset)
    allowed = set(range(len(values))) if from_zero else set(range(len(values) + 1))
    labelled = False
    for path in masks[:: max(1, len(masks) // MASKS_READ)][:MASKS_READ]:
        found_values = _mask_values(loader, path)
        labelled |= bool(found_values - {UNLABELLED} - (set() if from_zero else {0}))
        if wrong := found_values - allowed - {UNLABELLED}:
            start = "0 is unlabelled, classes count from 1" if not from_zero else "classes count from 0"
            raise UserError(
                f"{loader}: {path} has the values {sorted(wrong)}, but there are {len(values)} classes and {start}, "
                f"so 0 to {max(allowed)}, and {UNLABELLED} for unlabelled, were expected.\n"
                f"  values of the mask: {sorted(found_values)}\n  classes: {_listed(values)}"
            )
    if not labelled:
        raise UserError(f"{loader}: no pixel of {len(masks[:MASKS_READ])} masks in {mask_folder} has a class")
    if listed.is_file():
        return []
    lonely = sorted(set(_files(mask_folder, mask_suffix)) - {name + mask_suffix for name in names})
    return (
        [f"{loader}: {len(lonely)} masks without an image in {image_folder}: {_listed(lonely, 20)}"] if lonely else []
    )


def _files(folder: Path, suffix: str | None = None) -> list[str]:
    """Return the files that mmseg finds in a folder and the folders in it."""
    found = list_dir_or_file(str(folder), list_dir=False, suffix=suffix, recursive=True) if folder.is_dir() else []
    return sorted(found)


def _mask_values(loader: str, path: Path) -> set[int]:
    try:
        with Image.open(path) as mask:
            pixels = np.array(mask)
    except UNREADABLE as error:
        raise UserError(f"{loader}: the mask {path} cannot be read: {error}; mend or remove it") from error
    if pixels.ndim != 2:
        raise UserError(
            f"{loader}: the mask {path} has {pixels.shape[2]} channels ({mask.mode}); expected one, whose values are "
            f"class numbers (colours have to be turned into these)"
        )
    if wrong := labels_above_8_bits(pixels):
        raise UserError(f"{loader}: the mask {path} {wrong}")
    return set(np.unique(pixels).tolist())


def labels_above_8_bits(pixels: np.ndarray) -> str:
    """Say which labels of a mask mmseg would turn into others, as it keeps the last 8 bits; nothing if there are none.

    Args:
        pixels: of the mask, in as many bits as the file has.
    """
    wrong = np.unique(pixels[pixels > UNLABELLED]).tolist()
    if not wrong:
        return ""
    return (
        f"has the labels {_listed([str(label) for label in wrong], 10)}, mmseg reads masks of 8 bits alone ({wrong[0]} "
        f"as {wrong[0] % 256}); expected class numbers up to 254, and {UNLABELLED} for unlabelled"
    )


def _reduces_zero(dataset: Mapping[str, Any]) -> bool:
    """Whether 0 is unlabelled: mmseg reads it from the pipeline's transform."""
    for transform in dataset.get("pipeline", []):
        if transform["type"] == "LoadAnnotations" and transform.get("reduce_zero_label") is not None:
            return bool(transform["reduce_zero_label"])
    return bool(dataset.get("reduce_zero_label", dataset["type"].rpartition(".")[2] == "ADE20KDataset"))


def _require_files(loader: str, paths: Sequence[Path], what: str) -> None:
    there = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {p.parent for p in paths}}
    absent = [path for path in paths if path.name not in there[path.parent]]
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
            if not isinstance(entry, dict) or (absent := [name for name in wanted if name not in entry]):
                lacking = ", ".join(absent) if isinstance(entry, dict) else "keys"
                raise UserError(f"{path}: an entry of {key} lacks {lacking}: {str(entry)[:200]}")
        if twice := [number for number, count in Counter(entry["id"] for entry in content[key]).items() if count > 1]:
            raise UserError(f"{path}: {key} share an id, which must be one's own: {_listed(list(map(str, twice)), 20)}")
    categories = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        if annotation["category_id"] not in categories:
            raise UserError(
                f"{path}: annotation {annotation['id']} is of category {annotation['category_id']!r}, which is not "
                f"among the categories: {_listed(sorted(map(str, categories)), 20)}"
            )
        box = annotation["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, [*box, annotation["area"]])):
            raise UserError(
                f"{path}: annotation {annotation['id']} has the box {box!r} and the area {annotation['area']!r}; "
                f"expected [x, y, width, height] in pixels, and numbers"
            )
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


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
    for name in ("root", "image_suffix", "mask_suffix"):
        if not isinstance(described.get(name, ""), str):
            raise UserError(f"{path}: expected {name}: TEXT, got {described[name]!r}")
    if not isinstance(described.get("zero_is_unlabelled", False), bool):
        raise UserError(f"{path}: expected zero_is_unlabelled: true or false, got {described['zero_is_unlabelled']!r}")
    classes = described.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) or type(name) is int for name in classes):
        raise UserError(
            f"{path}: expected classes: [NAME, ...], got {classes!r} (YAML reads yes, no, on and off as true and false "
            f"unless they are quoted)"
        )
    for split in ("train", "val"):
        given = described.get(split)
        if (
            not isinstance(given, dict)
            or set(given) != set(SPLIT_KEYS[task])
            or not all(isinstance(folder, str) for folder in given.values())
        ):
            raise UserError(
                f"{path}: expected {split}: {{{', '.join(f'{key}: PATH' for key in SPLIT_KEYS[task])}}} for {task}, "
                f"got {described.get(split)!r}"
            )
    if task == "segmentation" and not described.get("classes"):
        raise UserError(f"{path}: expected classes: [...], the names in the order of the masks' values")
    return described


def _listed(names: Sequence[str], most: int = 100) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
