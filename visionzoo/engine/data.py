"""Data sets and loaders: timm's, checked before training starts."""

import argparse
import functools
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import FastCollateMixup, IterableImageDataset, create_dataset, create_loader
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import IterableDataset

from visionzoo.engine.errors import UserError, require
from visionzoo.engine.images import CheckedImages, LabelCheck
from visionzoo.engine.multilabel import TABLE, MultiLabelImages

EMBEDDED = ("visionzoo/digits",)
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "eval", "evaluation"),  # as timm looks for them
}


def image_mode(args: argparse.Namespace) -> str:
    """Return the PIL mode of the input images."""
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    return args.input_img_mode or ("RGB" if channels == 3 else "L")


def open_split(
    args: argparse.Namespace,
    *,
    is_training: bool,
    split: str,
    root: str | None,
    num_samples: int | None = None,
    class_map: Any = "",
) -> Any:
    """Open one split as timm does, wrapped in CheckedImages unless it is streamed.

    Raises:
        UserError: the data set, the split or its images are not there.
    """
    name = args.dataset
    if name.startswith("visionzoo/"):
        name, root = "", _embedded(name)
    prefix = name.partition("/")[0]
    if not name:
        root = _find_split(root, split)
    if isinstance(class_map, str) and class_map and Path(class_map).suffix != ".txt":
        raise UserError(f"--class-map: expected a .txt of class names in the order of their numbers, got {class_map}")
    checked = functools.partial(
        CheckedImages,
        mode=image_mode(args),
        is_training=is_training,
        skip_bad=args.skip_bad_images,
        seed=args.seed,
        upright=args.apply_exif_orientation,
    )
    if args.multi_label:
        if name:
            raise UserError(f"--multi-label reads folders with a {TABLE}; leave --dataset {name} out")
        return checked(MultiLabelImages(Path(str(root)), class_map or None))
    notes: list[str] = []
    if not name and root and Path(root).is_dir():
        class_map, notes = _look_at_folders(args, Path(root), class_map, is_training)
    try:
        dataset: Any = create_dataset(
            name,
            root=root,
            split=split,
            search_split=bool(prefix),
            is_training=is_training,
            class_map=class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            repeats=getattr(args, "epoch_repeats", 0),
            input_img_mode=image_mode(args),
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
        )
    except (AssertionError, RuntimeError, ValueError, OSError, LookupError, ImportError, tarfile.TarError) as error:
        where = " ".join(str(part) for part in (name, root) if part)
        raise UserError(f"cannot open the {split!r} split of {where}: {error or type(error).__name__}") from error
    if isinstance(dataset, IterableDataset):
        return dataset
    if len(dataset) == 0:
        raise UserError(f"no images in the {split!r} split of {name or root}")
    images = checked(dataset)
    images.notes = notes
    return images


def _look_at_folders(args: argparse.Namespace, root: Path, class_map: Any, is_training: bool) -> tuple[Any, list[str]]:
    """Return the class map to use, and words on what timm passes over without any.

    Raises:
        UserError: a class has no image, or images lie beside the folders of the classes, and neither is to be skipped.
    """
    wanted = set(args.input_key.split(";")) if args.input_key else set(get_img_extensions(as_set=True))
    counts: Counter[str] = Counter()  # images of a class
    others: Counter[str] = Counter()  # pictures by their ending
    leaves: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        endings = Counter(os.path.splitext(file)[1].lower() for file in files)
        name = "" if Path(folder) == root else os.path.basename(folder)
        counts[name] += sum(endings[ending] for ending in wanted)
        others += Counter({ending: count for ending, count in endings.items() if ending not in wanted})
        if _is_class(name) and not any(map(_is_class, subfolders)):
            leaves.add(name)
    notes = []
    pictures = {ending: count for ending, count in others.items() if ending in Image.registered_extensions()}
    if pictures:
        listed = ", ".join(f"{count} {ending}" for ending, count in sorted(pictures.items()))
        keys = ";".join(sorted(wanted | set(pictures)))
        notes.append(f"{root}: pictures of other endings are left out ({listed}); --input-key '{keys}' takes them in")
    beside = {name: count for name, count in counts.items() if count and not _is_class(name)}
    if not class_map and beside and leaves:
        listed = ", ".join(f"{count} in {root / name}" for name, count in sorted(beside.items()))
        said = f"images lie beside the folders of the classes: {listed}"
        if not args.skip_bad_images:
            raise UserError(f"{said}; they would make a class of their own: move them, or pass --skip-bad-images")
        notes.append(f"{said}: passed over")
        names = sorted((name for name in counts if _is_class(name) and counts[name]), key=natural_key)
        class_map = {name: number for number, name in enumerate(names)}
    empty = sorted(name for name in leaves if not counts[name])
    if is_training and empty and any(counts.values()):
        without = f"no image ({' '.join(sorted(wanted))}) of {len(empty)} classes in {root}: {_some(empty)}"
        if not args.skip_bad_images:
            said = "".join(f". {note}" for note in notes)
            raise UserError(f"{without}; add some, remove the folders, or pass --skip-bad-images{said}")
        notes.append(f"{without}: passed over")
    return class_map, notes


def _is_class(folder: str) -> bool:
    """Whether a folder of that name is a class: not the split's own, nor one that an editor or a system has hidden."""
    return bool(folder) and not folder.startswith(".")


def _embedded(name: str) -> str:
    if name not in EMBEDDED:
        raise UserError(f"unknown embedded data set {name!r}; there is {', '.join(EMBEDDED)}")
    require("sklearn")
    from visionzoo.data import digits_folder

    try:
        return str(digits_folder())
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def _find_split(root: str | None, split: str) -> str:
    """Return the folder of a split; timm would fall back to the whole of `root`, validating on training images."""
    if not root:
        raise UserError("no images: give --data-dir, or --dataset visionzoo/digits for a set that needs no download")
    path = Path(root)
    if not path.exists():
        raise UserError(f"no data at {path}")
    if path.is_file():
        return root  # a .tar
    wanted = next((names for names in SPLIT_NAMES.values() if split in names), (split,))
    for name in dict.fromkeys((split, *wanted)):
        if (path / name).is_dir():
            return str(path / name)
    splits = {name for names in SPLIT_NAMES.values() for name in names}
    folders = sorted(child.name for child in path.iterdir() if child.is_dir())
    if not splits & set(folders):
        return root  # class folders: the split itself was given
    raise UserError(f"no {split!r} split in {path}; its folders are {', '.join(folders)}")


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of the classes in the order of their numbers, or None where the data set has none."""
    inner = getattr(dataset, "dataset", dataset)
    reader = getattr(inner, "reader", inner)
    for attribute in ("class_to_idx", "class_name_to_idx"):
        if mapping := getattr(reader, attribute, None):
            names = {index: str(name) for name, index in mapping.items()}
            return [names.get(index, str(index)) for index in range(max(names) + 1)]
    return None


def open_train_and_val(args: argparse.Namespace) -> tuple[Any, Any | None]:
    """Open the two splits, with the same numbers for the same classes.

    Raises:
        UserError: as open_split; or the two would be the same images, or validation has classes of its own.
    """
    train = open_split(
        args,
        is_training=True,
        split=args.train_split,
        root=args.data_dir,
        num_samples=args.train_num_samples,
        class_map=args.class_map,
    )
    if not args.val_split:
        return train, None

    def open_val(class_map: Any) -> Any:
        return open_split(
            args,
            is_training=False,
            split=args.val_split,
            root=args.val_data_dir or args.data_dir,
            num_samples=args.val_num_samples,
            class_map=class_map,
        )

    val = open_val(args.class_map)
    root = _root(train)
    if root is not None and root == _root(val):
        raise UserError(
            f"training and validation would read the same images, {root}; give a data set with a folder a split, "
            "or --val-data-dir, or --val-split '' to do without validation"
        )
    return train, with_same_classes(val, class_names(train), open_val)


def with_same_classes(dataset: Any, names: list[str] | None, reopen: Callable[[Any], Any]) -> Any:
    """Return `dataset`, reopened with a class map where its folders would be numbered otherwise than `names`.

    Raises:
        UserError: it has classes that are not among `names`.
    """
    own = class_names(dataset)
    if not names or not own or names == own:
        return dataset
    if strangers := sorted(set(own) - set(names)):
        raise UserError(
            f"{len(strangers)} classes of the evaluated images were not trained on: {_some(strangers)}; "
            f"trained on were {_some(names)}"
        )
    return reopen({name: index for index, name in enumerate(names)})


def check_labels(dataset: Any, num_classes: int) -> None:
    """Let a data set stop at, or pass over, images whose class numbers the model does not have."""
    if isinstance(dataset, CheckedImages):
        dataset.num_classes = num_classes
    elif isinstance(dataset, IterableImageDataset):
        dataset.target_transform = LabelCheck(num_classes)


def resolve_num_classes(given: int | None, names: list[str] | None) -> int | None:
    """Return the number of classes: as given, else as the data set has; None leaves it to the model.

    Raises:
        UserError: the two disagree.
    """
    if names and given is not None and given != len(names):
        raise UserError(
            f"num_classes is {given}, the data set has {len(names)} classes ({_some(names)}); "
            "leave --num-classes out, or number the classes by --class-map"
        )
    return len(names) if names else given


def _root(dataset: Any) -> str | None:
    return getattr(getattr(getattr(dataset, "dataset", None), "reader", None), "root", None)


def _some(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def train_loader(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], process: Any) -> Any:
    """Return timm's loader with the augmentation that `args` ask for; mixing is part of it."""
    if not isinstance(dataset, IterableDataset) and len(dataset) < args.batch_size * process.world_size:
        raise UserError(
            f"{len(dataset)} training images do not fill one batch of {args.batch_size} on {process.world_size} "
            "device(s); give a smaller --batch-size"
        )
    if args.aug_repeats and not process.distributed:
        raise UserError("--aug-repeats needs several processes (torchrun --nproc-per-node N ...); leave it out on one")
    collate = None
    if mixing(args):
        if args.multi_label:
            raise UserError("--multi-label does not go with mixup and cutmix; leave --mixup and --cutmix out")
        if args.batch_size % 2:
            raise UserError(f"mixup and cutmix need an even --batch-size, got {args.batch_size}")
        collate = FastCollateMixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
    return create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter or None,  # type: ignore[arg-type]  # at 0 timm's does nothing, slowly
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=data_config["interpolation"] if args.no_aug else args.train_interpolation,
        collate_fn=collate,
        **_common(args, data_config, process),
    )


def eval_loader(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], process: Any) -> Any:
    """Return timm's loader with the evaluation's crop."""
    return create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=getattr(args, "validation_batch_size", None) or args.batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        **_common(args, data_config, process),
    )


def _common(args: argparse.Namespace, data_config: dict[str, Any], process: Any) -> dict[str, Any]:
    return dict(
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=process.device,
        distributed=process.distributed,
    )


def mixing(args: argparse.Namespace) -> bool:
    """Say whether mixup or cutmix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
