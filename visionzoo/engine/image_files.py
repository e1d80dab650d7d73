"""The images that files, folders and patterns stand for, and a draw of them."""

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from visionzoo.engine.charts import is_picture
from visionzoo.engine.errors import UserError, printable
from visionzoo.engine.images import readable_images, skipped_images
from visionzoo.engine.restoring import Trained
from visionzoo.text import count_of

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what is taken from folders


def find_images(sources: Sequence[str], notes: list[str] | None = None) -> Iterator[Path]:
    """Yield the image files of files, folders (searched to the bottom) and glob patterns, sorted within each.

    Args:
        sources: names of them; a single file may be of any kind.
        notes: gets words on what was found and not taken: pictures of earlier predictions, files of other kinds, links
            by which images would be met again.

    Raises:
        UserError: one of them stands for no image, or a folder cannot be read.
    """
    notes = [] if notes is None else notes
    for source in sources:
        if not source:  # which Path takes for the current folder
            raise UserError("an image without a name: expected a file, a folder or a pattern, got ''")
        path = Path(source)
        if path.is_file():
            yield path
            continue
        links: list[str] = []
        found = _walk(path, links) if path.is_dir() else _match(source)
        files = sorted(file for file in found if file.suffix.lower() in PICTURES)
        images = [file for file in files if not is_picture(file)]
        other = Counter(file.suffix.lower() for file in found if file.suffix.lower() not in PICTURES)
        other = Counter({ending: n for ending, n in other.items() if ending in Image.registered_extensions()})
        ours = len(files) - len(images)
        passed = [f"{count_of(ours, 'picture')} of earlier predictions"] if ours else []
        passed += [f"{count} {ending}" for ending, count in sorted(other.items())]
        passed += [f"the link {link}" for link in links]
        if not images:
            but = f" but {', '.join(passed)}" if passed else ""
            raise UserError(f"no images at {source}{but}; known endings are {', '.join(PICTURES)}")
        if passed:
            notes.append(f"{source}: skipped {', '.join(passed)}")
        yield from images


def draw_images(sources: Sequence[str], number: int, trained: Trained, *, seed: int, skip_bad_images: bool) -> Tensor:
    """Return a batch of the images that a command names, drawn without replacement, transformed.

    Args:
        sources: files, folders and patterns.
        number: of the images.
        trained: whose images they are to be.
        seed: of the draw.
        skip_bad_images: skip those that cannot be read.

    Raises:
        UserError: none can be read, or one cannot and is not to be skipped.
    """
    notes: list[str] = []
    paths = list(dict.fromkeys(find_images(sources, notes)))
    if len(paths) < number:
        notes.append(f"{count_of(len(paths), 'image is', 'images are')} there, of --num-images {number}")
    random.Random(seed).shuffle(paths)
    transform: Any = create_transform(**trained.data_config, is_training=False)
    skipped: list[str] | None = [] if skip_bad_images else None
    readable = readable_images(paths, trained.mode, upright=trained.upright, skipped=skipped)
    batch: list[Tensor] = [transform(image) for _, image in islice(readable, number)]
    if skipped:
        notes.append(f"{skipped_images(skipped)}: {'; '.join(skipped)}")
    for note in notes:
        print(printable(note))
    if not batch:
        raise UserError("no image could be used")
    return torch.stack(batch)


def _walk(root: Path, links: list[str]) -> list[Path]:
    """Return the files of a folder and of those in it; links within it are noted, not followed."""

    def stop(error: OSError) -> None:
        raise UserError(
            f"cannot look into the folder {error.filename}: {error.strerror}; name its files or leave it out"
        )

    files: list[Path] = []
    top = os.path.realpath(root)
    seen = {top}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=stop):
        for name in list(subfolders):
            place = os.path.join(folder, name)
            target = os.path.realpath(place)
            within = os.path.commonpath((target, top)) in (target, top)  # in it, or above it
            if os.path.islink(place) and (within or target in seen):
                subfolders.remove(name)
                links.append(place)
            seen.add(target)
        files += [Path(folder, name) for name in names]
    return [file for file in files if file.is_file()]


def _match(pattern: str) -> list[Path]:
    """Return the files of a glob pattern; `**` follows no links, and only `.` finds hidden names, as in a shell."""
    anchor = Path(pattern).anchor
    parts = Path(pattern).parts[1:] if anchor else Path(pattern).parts
    if not parts:
        return []
    found = Path(anchor or ".").glob(str(Path(*parts)))
    hidden = any(part.startswith(".") and part != ".." for part in parts)
    return [
        file for file in found if file.is_file() and (hidden or not any(p[0] == "." and p != ".." for p in file.parts))
    ]
