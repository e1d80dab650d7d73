"""The YAML file that describes your own data: its keys and their types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionzoo.engine.errors import UserError, closest, require

DATASET_KEYS = {
    "detection": ("root", "train", "val", "classes", "background_images", "min_image_size"),
    "segmentation": ("root", "train", "val", "classes", "zero_is_unlabeled", "image_suffix", "mask_suffix"),
}
EARLIER_KEYS = {"zero_is_unlabelled": "zero_is_unlabeled"}  # still read
SPLIT_KEYS = {"detection": ("images", "annotations"), "segmentation": ("images", "masks")}


def read_description(path: Path, task: str) -> dict[str, Any]:
    """Read and check the file.

    Raises:
        UserError: it cannot be read, or a key or the type of a value is another.
    """
    yaml = require("yaml")
    try:
        described = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the dataset {path}: {error}") from error
    if not isinstance(described, dict):
        raise UserError(f"{path}: expected keys and values ({', '.join(DATASET_KEYS[task])}), got {described!r}")
    described = {EARLIER_KEYS.get(name, name): value for name, value in described.items()}
    for name in described:
        if name not in DATASET_KEYS[task]:
            raise UserError(f"{path}: unknown key {name!r} for {task}{closest(str(name), DATASET_KEYS[task])}")
    described.setdefault("root", ".")
    for name in ("root", "image_suffix", "mask_suffix"):
        if not isinstance(described.get(name, ""), str):
            raise UserError(f"{path}: expected {name}: TEXT, got {described[name]!r}")
    for name in ("zero_is_unlabeled", "background_images"):
        if not isinstance(described.get(name, False), bool):
            raise UserError(f"{path}: expected {name}: true or false, got {described[name]!r}")
    least = described.get("min_image_size", 0)
    if type(least) is not int or least < 0:
        raise UserError(f"{path}: expected min_image_size: PIXELS, 0 or more, got {least!r}")
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
