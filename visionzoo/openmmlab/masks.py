"""Masks of class indices: whether they are there, and which classes they have."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.fileio import list_dir_or_file
from PIL import Image

from visionzoo.engine.errors import UserError
from visionzoo.engine.images import UNREADABLE
from visionzoo.text import count_of, some

UNLABELLED = 255  # in masks; mmseg's ignore_index
MASKS_READ = 50  # of each split
MASKS_SEARCHED = 500  # more of them, for a class that the first do not have


def check_masks(
    loader: str, dataset: Mapping[str, Any], classes: list[str], own: list[str] | None, *, annotated: bool = True
) -> tuple[list[str], list[Path]]:
    """Compare masks with images and classes; count the pixels of each class.

    Args:
        loader: the name of its part of the config.
        dataset: of mmseg.
        classes: to learn.
        own: those that the kind of data set has by itself.
        annotated: False where results are written for a test server, and no masks are read.

    Returns:
        A summary and what is worth saying; the images.

    Raises:
        UserError: files are missing or cannot be used, or values and classes disagree.
    """
    if own and not set(classes) <= set(own):
        others = [name for name in classes if name not in own]
        raise UserError(
            f"{loader}: {dataset['type']} has classes of its own, {some(own)}; others than these ({some(others)}) need "
            f"--dataset FILE.yaml."
        )
    root, prefix = Path(dataset.get("data_root") or ""), dataset["data_prefix"]
    folder, suffix = root / prefix["img_path"], dataset.get("img_suffix", ".jpg")
    listed = Path(root, dataset.get("ann_file") or "")
    names = _image_names(loader, folder, suffix, listed if listed.is_file() else None)
    images = [folder / (name + suffix) for name in names]
    if not annotated:
        return [f"{loader}: {count_of(len(images), 'image')}, without masks"], images
    mask_folder, mask_suffix = root / prefix["seg_map_path"], dataset.get("seg_map_suffix", ".png")
    masks = [mask_folder / (name + mask_suffix) for name in names]
    require_files(loader, masks, "mask")
    lines = _count_pixels(loader, masks, classes, own or classes, from_zero=not reduces_zero(dataset))
    if not listed.is_file():
        lonely = sorted(set(_files(mask_folder, mask_suffix)) - {name + mask_suffix for name in names})
        if lonely:
            lines.append(f"{loader}: {count_of(len(lonely), 'mask')} without an image in {folder}: {some(lonely, 20)}")
    return lines, images


def _image_names(loader: str, folder: Path, suffix: str, listed: Path | None) -> list[str]:
    if listed:
        names = [line.strip() for line in listed.read_text().splitlines()]
        require_files(loader, [folder / (name + suffix) for name in names], "image")
        if not names:
            raise UserError(f"{loader}: {listed} lists no images")
        return names
    found = _files(folder)
    names = [file[: -len(suffix)] for file in found if file.endswith(suffix)]
    if not names:
        others = sorted({Path(file).suffix for file in found})
        there = f"files {some(others)}: name their ending by image_suffix" if others else "no files"
        raise UserError(f"{loader}: no images *{suffix} in {folder}; there are {there}")
    return names


def _count_pixels(
    loader: str, masks: Sequence[Path], classes: list[str], values: list[str], *, from_zero: bool
) -> list[str]:
    """Read a sample of masks, and more of them while a class has no pixel in any.

    Args:
        loader: the name of its part of the config.
        masks: of the split.
        classes: to learn; mmseg maps the data set's own to them.
        values: the class of each value of a mask, from 0, or from 1 where 0 is unlabeled.
        from_zero: whether the first class is 0.
    """
    first = 0 if from_zero else 1
    allowed = set(range(len(values) + first))
    start = "counted from 0" if from_zero else "counted from 1, as 0 is unlabeled"
    number = {name: values.index(name) + first for name in classes}
    step = max(1, len(masks) // MASKS_READ)
    sample = masks[::step][:MASKS_READ]
    chosen = set(sample)
    others = [path for path in masks if path not in chosen][:MASKS_SEARCHED]
    pixels: Counter[int] = Counter()
    read = 0
    for path in [*sample, *others]:
        if read >= len(sample) and all(pixels[value] for value in number.values()):
            break
        found = _mask_values(loader, path)
        if wrong := set(found) - allowed - {UNLABELLED}:
            jpeg = path.suffix.lower() in (".jpg", ".jpeg")
            lossy = " (JPEG does not keep values: masks need PNG)" if jpeg else ""
            advice = ""
            if from_zero and wrong == {max(allowed) + 1} and not jpeg:
                advice = "\n  if classes count from 1 and 0 is unlabeled: zero_is_unlabeled: true in --dataset's file"
            raise UserError(
                f"{loader}: {path} has the values {_values(wrong)}{lossy}, expected 0 to "
                f"{max(allowed)}, and {UNLABELLED} for unlabeled: {count_of(len(values), 'class')}, {start}.\n"
                f"  values of the mask: {_values(found)}\n  classes: {some(values, 100)}{advice}"
            )
        pixels += found
        read += 1
    total = sum(pixels.values())
    absent = [name for name in classes if not pixels[number[name]]]
    if len(absent) == len(classes):
        raise UserError(f"{loader}: no pixel of {count_of(read, 'mask')} in {masks[0].parent} has a class")
    unlabelled = pixels[UNLABELLED] + (0 if from_zero else pixels[0])
    shares = [f"{name} {pixels[value] / total:.1%}" for name, value in number.items()]
    shares.append(f"unlabeled {unlabelled / total:.1%}")
    lines = [f"{loader}: {count_of(len(masks), 'image')}; pixels of {count_of(read, 'mask')}: {some(shares, 100)}"]
    if absent:
        hint = ""
        if pixels[UNLABELLED]:
            hint = f"; {UNLABELLED} is unlabeled, never a class: masks of 0 and 255 have to become 0 and 1"
        whole = "any mask" if read == len(masks) else f"any of the {read} masks read of {len(masks)}"
        lines.append(
            f"{loader}: {len(absent)} of {count_of(len(classes), 'class')} without a pixel in {whole}: "
            f"{some(absent)}{hint}"
        )
    return lines


def _values(values: Iterable[int]) -> str:
    """Return the first of a mask's values in their order."""
    return f"[{some([str(value) for value in sorted(values)], 20)}]"


def require_files(loader: str, paths: Sequence[Path], what: str) -> None:
    """Raise UserError unless all files are there."""
    there = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {p.parent for p in paths}}
    absent = [path for path in paths if path.name not in there[path.parent]]
    if absent:
        inner = absent[0].name.rpartition("\\")[2]
        hint = ""
        if inner != absent[0].name:
            hint = f". Its name has the \\ of Windows: write names with /, relative to the folder, such as {inner}"
        raise UserError(f"{loader}: missing: {count_of(len(absent), what)}, the first {absent[0]}{hint}")


def _files(folder: Path, suffix: str | None = None) -> list[str]:
    """Return the files that mmseg finds in a folder and the folders in it."""
    found = list_dir_or_file(str(folder), list_dir=False, suffix=suffix, recursive=True) if folder.is_dir() else []
    return sorted(found)


def _mask_values(loader: str, path: Path) -> Counter[int]:
    try:
        with Image.open(path) as mask:
            pixels = np.array(mask)
    except UNREADABLE as error:
        raise UserError(f"{loader}: the mask {path} cannot be read: {error}; fix or remove it") from error
    if pixels.ndim != 2:
        raise UserError(
            f"{loader}: the mask {path} has {count_of(pixels.shape[2], 'channel')} ({mask.mode}); expected "
            f"one, whose values are class numbers (colors have to be turned into these)"
        )
    if wrong := labels_beyond_8_bits(pixels):
        raise UserError(f"{loader}: the mask {path} {wrong}")
    values, counts = np.unique(pixels, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def labels_beyond_8_bits(pixels: np.ndarray) -> str:
    """Say which labels of a mask mmseg would turn into others, as it keeps the last 8 bits; nothing if there are none.

    Args:
        pixels: of the mask, in as many bits as the file has, or in floating point.
    """
    with np.errstate(invalid="ignore"):
        read = pixels.astype(np.uint8)
    differ = pixels != read
    wrong, first = np.unique(pixels[differ], return_index=True)
    if not wrong.size:
        return ""
    return (
        f"has the labels {some([str(label) for label in wrong.tolist()])}, mmseg reads only masks of 8 bits "
        f"({wrong[0]} as {read[differ][first[0]]}); expected class numbers up to 254, and {UNLABELLED} for unlabeled"
    )


def reduces_zero(dataset: Mapping[str, Any]) -> bool:
    """Whether 0 is unlabeled: mmseg reads it from the pipeline's transform."""
    for transform in dataset.get("pipeline", []):
        if transform["type"] == "LoadAnnotations" and transform.get("reduce_zero_label") is not None:
            return bool(transform["reduce_zero_label"])
    return bool(dataset.get("reduce_zero_label", dataset["type"].rpartition(".")[2] == "ADE20KDataset"))
