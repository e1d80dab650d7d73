"""Scenes composed of the handwritten digits, for detection (COCO's format) and segmentation (ADE20K's layout).

Every scene is a grey landscape of smooth noise with one to five digits of the embedded set, scaled and placed without
overlap. Digits of training scenes are those of the training split, so that validation scenes hold unseen handwriting.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionzoo.data.digits import digits_folder
from visionzoo.text import count_of

SIDE = 128  # pixels
COUNTS = {"train": 400, "validation": 80}
INK = 96  # a pixel of at least this grey level, of 255, belongs to the digit
DIGITS = [str(digit) for digit in range(10)]
CLASSES = ["background", *DIGITS]  # of segmentation; the mask's value is the index + 1, 0 is unlabeled


def scenes_folder() -> Path:
    """Return the folder with the scenes, written on first use beside the digits.

    `images/<split>/*.png`; `detection/<split>.json` in COCO's format, with boxes and masks of 10 classes;
    `annotations/<split>/*.png` as ADE20K has them, of 11 classes (`CLASSES`). Splits are train and validation.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: the folder is there, but not complete.
    """
    digits = digits_folder()
    folder = digits.parent / "scenes"
    if not folder.exists():
        temporary = Path(tempfile.mkdtemp(prefix=".scenes-", dir=digits.parent))
        try:
            for split, count in COUNTS.items():
                _write_split(digits / split, temporary, split, count)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for split in COUNTS:
        named = json.loads((folder / "detection" / f"{split}.json").read_text())["images"]
        for kind in ("images", "annotations"):
            found = sum(1 for _ in (folder / kind / split).glob("*.png"))
            if found != len(named):
                raise ValueError(
                    f"expected {count_of(len(named), 'file')} in {folder / kind / split}, {found=}; delete "
                    f"{folder}, and it is "
                    f"written again"
                )
    return folder


def _write_split(digits: Path, folder: Path, split: str, count: int) -> None:
    glyphs = [[np.array(Image.open(path)) for path in sorted((digits / digit).glob("*.png"))] for digit in DIGITS]
    random = np.random.default_rng(list(COUNTS).index(split))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for kind in ("images", "annotations"):
        (folder / kind / split).mkdir(parents=True)
    for number in range(count):
        name = f"{number:04d}.png"
        picture, instances = _scene(glyphs, random)
        Image.fromarray(picture).save(folder / "images" / split / name)
        labels = np.ones((SIDE, SIDE), np.uint8)
        for digit, mask in instances:
            labels[mask] = digit + 2
            annotations.append(_annotation(len(annotations) + 1, number, digit, mask))
        Image.fromarray(labels).save(folder / "annotations" / split / name)
        images.append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
    categories = [{"id": digit + 1, "name": name} for digit, name in enumerate(DIGITS)]
    path = folder / "detection" / f"{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _scene(glyphs: list[list[Any]], random: np.random.Generator) -> tuple[Any, list[tuple[int, Any]]]:
    """Return a picture [SIDE, SIDE, 3] and its digits with their masks [SIDE, SIDE]."""
    noise = Image.fromarray(random.integers(40, 120, (6, 6)).astype(np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    picture = np.array(noise, np.float32)
    picture += random.normal(0, 6, picture.shape)
    instances: list[tuple[int, Any]] = []
    taken = np.zeros((SIDE, SIDE), bool)
    for _ in range(random.integers(2, 6)):
        digit, size = int(random.integers(10)), int(random.integers(24, 49))
        glyph = Image.fromarray(glyphs[digit][random.integers(len(glyphs[digit]))])
        ink = np.array(glyph.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        top, left = random.integers(0, SIDE - size, 2)
        window = (slice(top, top + size), slice(left, left + size))
        if taken[window].any():
            continue  # one digit fewer
        taken[window] = True
        picture[window] += ink / 255 * (random.uniform(110, 200))
        mask = np.zeros((SIDE, SIDE), bool)
        mask[window] = ink >= INK
        instances.append((digit, mask))
    grey = picture.clip(0, 255).astype(np.uint8)
    return np.stack([grey] * 3, axis=-1), instances


def _annotation(number: int, image: int, digit: int, mask: Any) -> dict[str, Any]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": number,
        "image_id": image,
        "category_id": digit + 1,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "segmentation": {"size": [SIDE, SIDE], "counts": _run_lengths(mask)},
    }


def _run_lengths(mask: Any) -> list[int]:
    """COCO's uncompressed run lengths: of 0, of 1, of 0, ... down the columns, one column after the other."""
    flat = np.concatenate([[False], mask.T.reshape(-1), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *changes.tolist(), mask.size]).tolist()
