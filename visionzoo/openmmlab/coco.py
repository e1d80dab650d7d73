"""Annotations in COCO's format: what each field must hold, and what mmdet and COCO's metric make of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from visionzoo.engine.errors import UserError
from visionzoo.openmmlab.masks import require_files
from visionzoo.text import count_of, some


class Field(NamedTuple):
    """What a field of an entry may hold."""

    accepts: Callable[[Any], bool]
    expected: str
    optional: bool = False  # may be absent


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _segmentation(value: Any) -> bool:
    if isinstance(value, Mapping):
        size = value.get("size")
        whole = isinstance(size, list) and len(size) == 2 and all(_number(side) and side > 0 for side in size)
        counts = value.get("counts")
        return whole and (isinstance(counts, str) or (isinstance(counts, list) and all(map(_number, counts))))
    return value is None or (
        isinstance(value, list) and all(isinstance(polygon, list) and all(map(_number, polygon)) for polygon in value)
    )


_ID = Field(lambda value: isinstance(value, str) or (_number(value) and value == int(value)), "a whole number or text")
_TEXT = Field(lambda value: isinstance(value, str) and value != "", "text")
_SIDE = Field(lambda value: _number(value) and value >= 1 and value == int(value), "a number of pixels, 1 or more")
_FLAG = Field(lambda value: isinstance(value, int | float) and value in (0, 1), "0 or 1", optional=True)
FIELDS = {
    "images": {"id": _ID, "file_name": _TEXT, "height": _SIDE, "width": _SIDE},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": Field(
            lambda value: isinstance(value, list) and len(value) == 4 and all(map(_number, value)),
            "[x, y, width, height] in pixels",
        ),
        "area": Field(_number, "a number of pixels"),
        "iscrowd": _FLAG,
        "ignore": _FLAG,
    },
    "categories": {"id": _ID, "name": _TEXT},
}
_MASK = Field(
    _segmentation,
    "a list of polygons [[x1, y1, x2, y2, ...], ...], or run lengths {size: [height, width], counts: ...}",
    optional=True,
)


def annotation_file(dataset: Mapping[str, Any]) -> Path:
    """Return the path of a data set's annotations."""
    return Path(dataset.get("data_root") or "", dataset["ann_file"])


def category_names(path: Path) -> list[str]:
    """Return the categories of a file in its order, which is how mmdet numbers them."""
    return [category["name"] for category in read_coco(path)["categories"]]


def read_coco(path: Path, *, annotated: bool = True) -> dict[str, Any]:
    """Read and check a file of annotations.

    Args:
        path: of JSON in COCO's format.
        annotated: False lets the list of annotations be absent, as in the files of test servers.

    Raises:
        UserError: it cannot be read, or a field holds something else than COCO's format says.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"no annotations at {path}. Give the folder of the data by --data-root, or your own by --dataset FILE. "
            f"`visionzoo check-data` says what a folder of COCO or ADE20K lacks."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if isinstance(content, dict) and not annotated:
        content.setdefault("annotations", [])
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in FIELDS):
        raise UserError(f"{path} is not in COCO's format: expected an object with the lists {', '.join(FIELDS)}")
    for key, fields in FIELDS.items():
        _check_entries(path, key, content[key], fields)
        repeated = [
            str(number) for number, count in Counter(entry["id"] for entry in content[key]).items() if count > 1
        ]
        if repeated:
            raise UserError(f"{path}: several {key} have the same id: {some(repeated, 20)}; each needs one of its own")
    names = [category["name"] for category in content["categories"]]
    if shared := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{path}: several categories have the same name: {some(shared, 20)}; mmdet would make a class of each. "
            f"Rename them, or give their annotations one category_id"
        )
    categories = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        if annotation["category_id"] not in categories:
            raise UserError(
                f"{path}: annotation {annotation['id']} is of category {annotation['category_id']!r}, which is not "
                f"among the categories: {some(sorted(map(str, categories)), 20)}"
            )
    return content


def _check_entries(path: Path, key: str, entries: Sequence[Any], fields: Mapping[str, Field]) -> None:
    for entry in entries:
        if not isinstance(entry, dict):
            raise UserError(f"{path}: an entry of {key} has no keys: {str(entry)[:200]}")
        if absent := [name for name, field in fields.items() if name not in entry and not field.optional]:
            raise UserError(f"{path}: an entry of {key} lacks {', '.join(absent)}: {str(entry)[:200]}")
        for name, field in fields.items():
            if name in entry and not field.accepts(entry[name]):
                raise UserError(
                    f"{path}: the entry {entry['id']!r} of {key} has {name}={str(entry[name])[:100]!r} "
                    f"({type(entry[name]).__name__}); expected {field.expected}"
                )


def check_coco(
    loader: str, dataset: Mapping[str, Any], classes: list[str], *, annotated: bool = True
) -> tuple[list[str], list[Path]]:
    """Compare a file of annotations with the classes; count what is used and what is not.

    Returns:
        A summary and what is worth saying; the images.

    Raises:
        UserError: files are missing, names disagree, or nothing is left to learn from or to compare with.
    """
    path = annotation_file(dataset)
    content = read_coco(path, annotated=annotated)
    _check_names(loader, path, classes, [category["name"] for category in content["categories"]])
    folder = Path(dataset.get("data_root") or "", (dataset.get("data_prefix") or {}).get("img", ""))
    images = {image["id"]: image for image in content["images"]}
    files = [folder / image["file_name"] for image in content["images"]]
    if not images:
        raise UserError(f"{loader}: {path} lists no images")
    require_files(loader, files, "image")
    if not annotated:
        return [f"{loader}: {count_of(len(images), 'image')}, without annotations"], files
    of_class = {category["id"]: category["name"] for category in content["categories"] if category["name"] in classes}
    listed = [a for a in content["annotations"] if a["category_id"] in of_class and a["image_id"] in images]
    evaluated = loader != "train_dataloader"
    notes = _unused(loader, path, content, images, of_class) + _repeated(loader, path, content, listed)
    reasons = {a["id"]: _why_not_learnt(a, images[a["image_id"]]) for a in listed}
    if loads_masks(dataset):
        notes += _check_segmentations(loader, path, [a for a in listed if evaluated or not reasons[a["id"]]], images)
    if evaluated:
        if lacking := [str(a["id"]) for a in listed if "iscrowd" not in a]:
            raise UserError(f'{path}: COCO\'s metric needs "iscrowd": 0 or 1 in annotations: {some(lacking, 20)}')
        counted = [a for a in listed if not a["iscrowd"]]
        fate = "which the metric counts as objects to be found; remove them from the file"
        odd = {a["id"]: reasons[a["id"]] for a in counted if reasons[a["id"]]}
    else:
        counted = [a for a in listed if not reasons[a["id"]]]
        fate = "from which nothing is learned"
        odd = {key: reason for key, reason in reasons.items() if reason}
    for reason in dict.fromkeys(odd.values()):
        which = [str(key) for key, found in odd.items() if found == reason]
        notes.append(f"{loader}: {count_of(len(which), 'box')} of {path} {reason}, {fate}: {some(which, 20)}")
    if beyond := [str(a["id"]) for a in counted if not reasons[a["id"]] and _is_beyond(a, images[a["image_id"]])]:
        notes.append(
            f"{loader}: {count_of(len(beyond), 'box')} of {path} beyond their image by more than a pixel; bbox "
            "is [x, y, "
            f"width, height], not two corners, in pixels of the stored size: {some(beyond, 20)}"
        )
    crowds = len(listed) - len(counted) if evaluated else 0
    if crowds:
        notes.append(f"{loader}: {count_of(crowds, 'annotation')} of {path}: crowds (iscrowd: 1): not to be found")
    used, left_out = _images_used(dataset, images, listed, evaluated=evaluated)
    notes += [
        f"{loader}: {count} of {count_of(len(images), 'image')} left out: {why}"
        for why, count in left_out.items()
        if count
    ]
    in_use = [a for a in counted if a["image_id"] in used]
    boxes = Counter(of_class[a["category_id"]] for a in in_use)
    summary = (
        f"{loader}: {len(used)} of {count_of(len(images), 'image')}, {count_of(len(in_use), 'box')}: "
        f"{some([f'{name} {boxes[name]}' for name in classes], 100)}"
    )
    if not in_use:
        raise UserError(f"{loader}: {path} leaves nothing to {'evaluate' if evaluated else 'learn from'}. "
                        + "\n  ".join([summary, *notes]))  # fmt: skip
    if without := [name for name in classes if not boxes[name]]:
        fate = "COCO's metric ignores them" if evaluated else "they are never learned"
        notes.append(
            f"{loader}: {len(without)} of {count_of(len(classes), 'class')} without a box, {fate}: {some(without)}"
        )
    return [summary, *notes], files


def _check_names(loader: str, path: Path, classes: list[str], annotated: list[str]) -> None:
    missing = [name for name in classes if name not in annotated]
    both = f"\n  classes of the config: {some(classes, 100)}\n  categories of {path}: {some(annotated, 100)}"
    if missing:
        raise UserError(
            f"{loader}: {len(missing)} of {count_of(len(classes), 'class')} not among the annotated categories "
            f"({some(missing, 100)}); they would never be learned, or all of AP be 0.{both}\nName your classes by "
            f"--classes a,b,c, or give the data by --dataset FILE.yaml. A class that only this split lacks needs its "
            f"category there, without annotations."
        )
    if [name for name in annotated if name in classes] != classes:
        raise UserError(
            f"{loader}: classes and annotated categories are in different order, and mmdet numbers them in that of the "
            f"file: predictions would have wrong names.{both}"
        )


def _unused(
    loader: str, path: Path, content: Mapping[str, Any], images: Mapping[Any, Any], of_class: Mapping[Any, str]
) -> list[str]:
    unused = [category["name"] for category in content["categories"] if category["id"] not in of_class]
    lost = [str(a["id"]) for a in content["annotations"] if a["image_id"] not in images]
    notes = []
    if unused:
        notes.append(
            f"{loader}: {count_of(len(unused), 'unused category', 'unused categories')} in {path}: {some(unused, 20)}"
        )
    if lost:
        what = f"{count_of(len(lost), 'annotation')} of images that it does not list"
        notes.append(f"{loader}: {what} in {path}: {some(lost, 20)}")
    return notes


def _repeated(loader: str, path: Path, content: Mapping[str, Any], listed: Sequence[Any]) -> list[str]:
    """Name images that are listed under several ids, and annotations that are there twice."""
    names = Counter(image["file_name"] for image in content["images"])
    notes = []
    if images := [name for name, count in names.items() if count > 1]:
        notes.append(
            f"{loader}: {count_of(len(images), 'image')} of {path} listed under several ids, "
            f"each with annotations of its own, and the objects of the others are background there: {some(images, 20)}"
        )
    seen: set[tuple[Any, ...]] = set()
    repeated = []
    for a in listed:
        # instances may share a box, hardly a mask too
        key = (a["image_id"], a["category_id"], *a["bbox"], json.dumps(a.get("segmentation")))
        if key in seen:
            repeated.append(str(a["id"]))
        seen.add(key)
    if repeated:
        notes.append(
            f"{loader}: {count_of(len(repeated), 'annotation')} of {path} equal to another of the same image, "
            f"category, box and mask; each counts as an object of its own: {some(repeated, 20)}"
        )
    return notes


def _is_beyond(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> bool:
    x, y, width, height = annotation["bbox"]
    return min(x, y) < -1 or x + width > image["width"] + 1 or y + height > image["height"] + 1


def _why_not_learnt(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> str:
    """Say why mmdet learns no object from an annotation; nothing if it does."""
    x, y, width, height = annotation["bbox"]
    if annotation.get("ignore"):
        return "marked ignore: 1"
    if min(x + width, image["width"]) <= max(x, 0) or min(y + height, image["height"]) <= max(y, 0):
        return "outside of the image"
    if width < 1 or height < 1:
        return "smaller than a pixel"
    if annotation["area"] <= 0:
        return 'with "area": 0 or less'
    return "marked as crowds (iscrowd: 1)" if annotation.get("iscrowd") else ""


def _images_used(
    dataset: Mapping[str, Any], images: Mapping[Any, Any], listed: Sequence[Any], *, evaluated: bool
) -> tuple[set[Any], dict[str, int]]:
    """Return the ids that mmdet keeps, and how many it does not for each reason; it filters only for training."""
    choice = {} if evaluated or dataset.get("test_mode") else dataset.get("filter_cfg") or {}
    boxed = {a["image_id"] for a in listed} if choice.get("filter_empty_gt") else set(images)
    least = choice.get("min_size", 0)
    large = {key for key, image in images.items() if min(image["width"], image["height"]) >= least}
    return boxed & large, {
        "without an annotation of the classes (to learn from them as background: background_images: true in "
        "--dataset's file, or filter_cfg.filter_empty_gt=False)": len(images) - len(boxed),
        f"smaller than {count_of(least, 'pixel')} (min_image_size in --dataset's file, or filter_cfg.min_size)": len(
            boxed - large
        ),
    }


def loads_masks(dataset: Mapping[str, Any]) -> bool:
    """Whether a data set's pipeline reads masks."""
    return any(transform.get("with_mask") for transform in dataset.get("pipeline", []))


def _check_segmentations(
    loader: str, path: Path, annotations: Sequence[dict[str, Any]], images: Mapping[Any, Mapping[str, Any]]
) -> list[str]:
    _check_entries(path, "annotations", annotations, {"id": _ID, "segmentation": _MASK})
    if without := [str(a["id"]) for a in annotations if not a.get("segmentation")]:
        raise UserError(
            f"{loader}: {len(without)} of {count_of(len(annotations), 'annotation')} of {path} have no "
            f"segmentation, and this detector learns masks: {some(without, 20)}. Add polygons, or take a "
            "detector of only boxes, such as "
            f"RetinaNet."
        )
    for a in annotations:
        image, mask = images[a["image_id"]], a["segmentation"]
        if isinstance(mask, list):
            continue
        size = [image["height"], image["width"]]
        pixels = sum(mask["counts"]) if isinstance(mask["counts"], list) else math.prod(size)
        if mask["size"] != size or pixels != math.prod(size):
            raise UserError(
                f"{loader}: annotation {a['id']} of {path} has run lengths of the size {mask['size']} over {pixels} "
                f"pixels; its image {image['file_name']} has {size} (height, width), {math.prod(size)} pixels"
            )
    polygons = [a for a in annotations if isinstance(a["segmentation"], list)]
    short = [str(a["id"]) for a in polygons if any(len(p) < 6 or len(p) % 2 for p in a["segmentation"])]
    if not short:
        return []
    found = (
        f"{loader}: {len(short)} of {count_of(len(annotations), 'annotation')} of {path} have a polygon "
        f"of fewer than three points, or of an odd number of coordinates: {some(short, 20)}"
    )
    if loader != "train_dataloader":
        raise UserError(f"{found}. COCO's metric cannot read it: remove or fix these polygons")
    return [f"{found}; mmdet leaves these polygons out"]
