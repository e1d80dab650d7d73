"""Where COCO and ADE20K come from, how their folders look, and what one lacks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from visionzoo.text import count_of


@dataclass(frozen=True)
class Folder:
    """One folder, or annotation file, of a data set."""

    path: str
    files: int = 0  # in it, of the whole data set; 0 for a file of its own
    annotates: str = ""  # the folder whose images a COCO file names


LAYOUTS = {
    "coco": (
        "COCO 2017: train2017.zip, val2017.zip and annotations_trainval2017.zip of https://cocodataset.org/#download, "
        "unpacked side by side. Images under their Flickr licenses, annotations CC BY 4.0.",
        (
            Folder("train2017", 118287),
            Folder("val2017", 5000),
            Folder("annotations/instances_train2017.json", annotates="train2017"),
            Folder("annotations/instances_val2017.json", annotates="val2017"),
        ),
    ),
    "ade20k": (
        "ADE20K, the scene parsing benchmark (150 classes): ADEChallengeData2016.zip of "
        "http://sceneparsing.csail.mit.edu, unpacked. For research and education, see its terms.",
        (
            Folder("images/training", 20210),
            Folder("images/validation", 2000),
            Folder("annotations/training", 20210),
            Folder("annotations/validation", 2000),
        ),
    ),
}


def check_folder(name: str, root: str | Path) -> tuple[list[str], list[str]]:
    """Compare a folder with the layout of `LAYOUTS[name]`; return what is found, and what is missing or incomplete."""
    root = Path(root)
    found, missing = [], []
    for folder in LAYOUTS[name][1]:
        path = root / folder.path
        if folder.annotates:
            if not path.is_file():
                missing.append(f"{path}: not there")
                continue
            try:
                images = [image["file_name"] for image in json.loads(path.read_text())["images"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                missing.append(f"{path}: cannot be read as annotations of COCO, {type(error).__name__}: {error}")
                continue
            absent = [image for image in images if not (root / folder.annotates / image).exists()]
            found.append(f"{path}: {count_of(len(images), 'image')}")
            if absent:
                missing.append(
                    f"{path}: {len(absent)} of its images are not in {folder.annotates}, such as {absent[0]}"
                )
        elif not path.is_dir():
            missing.append(f"{path}: not there, expected a folder with {count_of(folder.files, 'file')}")
        else:
            count = sum(1 for _ in path.iterdir())
            found.append(f"{path}: {count} of {count_of(folder.files, 'file')}")
            if count < folder.files:
                missing.append(f"{path}: {folder.files - count} of {folder.files} files are missing")
    if name == "ade20k":
        missing += _unpaired(root)
    return found, missing


def _unpaired(root: Path) -> list[str]:
    problems = []
    for split in ("training", "validation"):
        images = {path.stem for path in (root / "images" / split).glob("*.jpg")}
        masks = {path.stem for path in (root / "annotations" / split).glob("*.png")}
        if images ^ masks:
            problems.append(
                f"{split}: {count_of(len(images - masks), 'image')} without mask, "
                f"{count_of(len(masks - images), 'mask')} without image"
            )
    return problems
