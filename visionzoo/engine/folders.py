"""What lies in the folders of a data set: timm skips, or takes for a class, what it does not expect there."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import DataConfig
from visionzoo.text import count_of, some

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "eval", "evaluation"),  # as timm looks for them
}


def find_split(root: str | None, split: str) -> str:
    """Return the folder of a split; timm would fall back to the whole of `root`, validating on training images."""
    if not root:
        raise UserError("no images: give --data-dir, or --dataset visionzoo/digits for a set that needs no download")
    path = Path(root)
    if not path.exists():
        raise UserError(f"no data at {path}")
    if path.is_file():
        if path.suffix != ".tar":
            raise UserError(f"expected a folder or a .tar of class folders, got {path}")
        return root
    wanted = next((names for names in SPLIT_NAMES.values() if split in names), (split,))
    for name in dict.fromkeys((split, *wanted)):
        if (path / name).is_dir():
            return str(path / name)
    splits = {name for names in SPLIT_NAMES.values() for name in names}
    folders = sorted(child.name for child in path.iterdir() if child.is_dir())
    if not splits & set(folders):
        return root  # class folders: the split itself was given
    raise UserError(f"no {split!r} split in {path}; its folders are {', '.join(folders)}")


def look_at_classes(data: DataConfig, root: Path, class_map: Any, is_training: bool) -> tuple[Any, list[str]]:
    """Return the class map to use, and notes on what timm skips without any.

    Raises:
        UserError: a class has no image, or images lie beside the folders of the classes, and neither is to be skipped.
    """
    wanted = set(data.input_key.split(";")) if data.input_key else set(get_img_extensions(as_set=True))
    counts: Counter[str] = Counter()  # images of a class
    others: Counter[str] = Counter()  # pictures by their ending
    leaves: set[str] = set()
    places: dict[str, list[str]] = {}  # folders with images of a class
    notes: list[str] = []
    for folder, subfolders, files in _walk(root, notes):
        endings = Counter(os.path.splitext(file)[1].lower() for file in files)
        name = "" if Path(folder) == root else os.path.basename(folder)
        counts[name] += (count := sum(endings[ending] for ending in wanted))
        if count and _is_class(name):
            places.setdefault(name, []).append(folder)
        others += Counter({ending: count for ending, count in endings.items() if ending not in wanted})
        if _is_class(name) and not any(map(_is_class, subfolders)):
            leaves.add(name)
    notes += _look_at_names(root, places)
    if class_map and data.class_map:
        notes += _look_at_class_map(class_map, data.class_map, root, {name for name, count in counts.items() if count})
    pictures = {ending: count for ending, count in others.items() if ending in Image.registered_extensions()}
    if pictures:
        listed = ", ".join(f"{count} {ending}" for ending, count in sorted(pictures.items()))
        keys = ";".join(sorted(wanted | set(pictures)))
        notes.append(f"{root}: pictures of other endings are left out ({listed}); --input-key '{keys}' takes them in")
    beside = {name: count for name, count in counts.items() if count and not _is_class(name)}
    if not class_map and beside:
        listed = ", ".join(f"{count} in {root / name}" for name, count in sorted(beside.items()))
        said = f"images lie beside the folders of the classes: {listed}"
        if not data.skip_bad_images:
            raise UserError(f"{said}; they would make a class of their own: move them, or pass --skip-bad-images")
        notes.append(f"{said}: skipped")
        names = sorted((name for name in counts if _is_class(name) and counts[name]), key=natural_key)
        class_map = {name: number for number, name in enumerate(names)}
    empty = sorted(name for name in leaves if not counts[name])
    if is_training and empty and any(counts.values()):
        without = f"no image ({' '.join(sorted(wanted))}) of {count_of(len(empty), 'class')} in {root}: {some(empty)}"
        if not data.skip_bad_images:
            said = "".join(f". {note}" for note in notes)
            raise UserError(f"{without}; add some, remove the folders, or pass --skip-bad-images{said}")
        notes.append(f"{without}: skipped")
    return class_map, notes


def _walk(root: Path, notes: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk through the folders as timm does, along links; add to `notes` which are met twice.

    Raises:
        UserError: a link leads to a folder that it lies in, so that timm would read all of it again and again.
    """
    seen: dict[tuple[int, int], str] = {}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        for name in subfolders:
            path = os.path.join(folder, name)
            target = os.path.realpath(path) if os.path.islink(path) else None
            if target and os.path.commonpath([here, target]) == target:
                raise UserError(
                    f"{path} is a link to {target}, a folder that it lies in itself: all images would be read again "
                    "and again; remove the link"
                )
        status = os.stat(folder)
        first = seen.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder:
            notes.append(f"{folder} is the same folder as {first}: its images are taken twice")
        yield folder, subfolders, files


def _look_at_names(root: Path, places: dict[str, list[str]]) -> list[str]:
    """Return words on folders that are one class to timm since they have one name.

    Raises:
        UserError: all have the same, so that there would be one class.
    """
    shared = {name: folders for name, folders in places.items() if len(folders) > 1}
    if shared and len(places) == 1:
        ((name, folders),) = shared.items()
        raise UserError(
            f"the images in {root} lie in {count_of(len(folders), 'folder')} that are all named {name!r} "
            f"({some(folders, 3)}), and "
            f"would all be of one class {name!r}: a class is named by the folder right above its images. Move them up, "
            f"out of {name!r}"
        )
    words = [f"{name!r} of {len(folders)} ({some(folders, 3)})" for name, folders in sorted(shared.items())]
    return [f"{root}: folders of one name are one class: {some(words, 5)}"] if words else []


def _look_at_class_map(class_map: Mapping[str, int], called: str, root: Path, folders: set[str]) -> list[str]:
    """Return notes on the folders that timm skips since a class map does not name them.

    Raises:
        UserError: it names none of them.
    """
    strangers = sorted(folders - class_map.keys())
    if strangers and len(strangers) == len(folders):
        raise UserError(
            f"{called} names none of the folders in {root}, which are {some(strangers)}; it names "
            f"{some(list(class_map))}"
        )
    if not strangers:
        return []
    return [
        f"{root}: {count_of(len(strangers), 'folder is', 'folders are')} left out, {called} lacks {some(strangers)}"
    ]


def _is_class(folder: str) -> bool:
    """Whether a folder of that name is a class: not the split's own, nor one that an editor or a system has hidden."""
    return bool(folder) and not folder.startswith(".")
