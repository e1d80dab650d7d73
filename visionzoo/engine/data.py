"""Data sets and loaders: timm's, checked before training starts."""

import argparse
import functools
import math
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import FastCollateMixup, IterableImageDataset, Mixup, create_dataset, create_loader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import IterableDataset
from torchvision.datasets import ImageFolder

from visionzoo.engine.cached import CachedImages, DeviceLoader, check_cached_labels, open_cached
from visionzoo.engine.errors import UserError, require
from visionzoo.engine.folders import find_split, look_at_classes
from visionzoo.engine.images import CheckedImages, LabelCheck
from visionzoo.engine.multilabel import TABLE, MultiLabelImages
from visionzoo.engine.names import read_class_map
from visionzoo.text import some

EMBEDDED = ("visionzoo/digits",)
READERS = ("torch", "hfds", "hfids", "tfds", "wds")  # timm's, by what stands before the / of --dataset
FOLDERS = ("", "imagefolder", "image_folder", "folder", "tar")  # names for images in folders or in a .tar
MODES = {"L": 1, "LA": 2, "RGB": 3, "YCbCr": 3, "HSV": 3, "LAB": 3, "RGBA": 4, "CMYK": 4, "I": 1, "F": 1}  # channels


def image_mode(args: argparse.Namespace) -> str:
    """Return the PIL mode of the input images.

    Raises:
        UserError: PIL has no such mode, or it has not as many channels as the model takes.
    """
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    mode: str = args.input_img_mode or ("RGB" if channels == 3 else "L")
    if mode not in MODES:
        raise UserError(f"--input-img-mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if MODES[mode] != channels:
        raise UserError(
            f"the model takes {channels} channels (--in-chans, --input-size), images of mode {mode} have "
            f"{MODES[mode]}; --input-img-mode names another"
        )
    return mode


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
    name = "" if name.lower() in FOLDERS else name
    prefix, _, rest = name.partition("/")
    if name and not (prefix in READERS and rest):
        known = ", ".join(f"{reader}/..." for reader in READERS)
        raise UserError(f"unknown data set {name!r}; expected {known} or {', '.join(EMBEDDED)}, or none for a folder")
    if not name:
        root = find_split(root, split)
    if isinstance(class_map, str) and class_map and Path(class_map).suffix != ".txt":
        raise UserError(f"--class-map: expected a .txt of class names in the order of their numbers, got {class_map}")
    if isinstance(class_map, str) and class_map:
        class_map = read_class_map(class_map, root)
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
    if getattr(args, "cache_images", ""):
        if name:
            raise UserError(f"--cache-images is for images in folders and .tar files; leave it or --dataset {name} out")
        assert root is not None
        without = argparse.Namespace(**{**vars(args), "cache_images": "", "dataset": ""})

        def open_images() -> Any:
            return open_split(without, is_training=is_training, split=split, root=root, class_map=class_map)

        return open_cached(args, root, mode=image_mode(args), class_map=class_map, open_images=open_images)
    notes: list[str] = []
    if not name and root and Path(root).is_dir():
        class_map, notes = look_at_classes(args, Path(root), class_map, is_training)
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
    if class_map and prefix == "torch":  # whose sets take none
        images.renumber(class_map, name)
    return images


def _embedded(name: str) -> str:
    if name not in EMBEDDED:
        raise UserError(f"unknown embedded data set {name!r}; there is {', '.join(EMBEDDED)}")
    require("sklearn")
    from visionzoo.data import digits_folder

    try:
        return str(digits_folder())
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of the classes in the order of their numbers, or None where the data set has none."""
    inner = getattr(dataset, "dataset", dataset)
    reader = getattr(inner, "reader", inner)
    for owner, attribute in ((dataset, "class_to_idx"), (reader, "class_to_idx"), (reader, "class_name_to_idx")):
        if mapping := getattr(owner, attribute, None):
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
    names = class_names(train)
    if names and len(names) == 1 and not args.multi_label:
        raise UserError(f"all training images are of one class, {names[0]!r}: there is nothing to tell apart")
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
    share, shared = same_images(args, train, val)
    if share == 1:
        raise UserError(
            f"training and validation would read the same images, {shared}; give a data set with a folder a split, "
            "or --val-data-dir, or --val-split '' to do without validation"
        )
    val = with_same_classes(val, names, open_val)
    if share:
        val.notes.append(f"images to validate on are trained on too: {shared}")
    return train, val


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
            f"{len(strangers)} classes of the evaluated images were not trained on: {some(strangers)}; "
            f"trained on were {some(names)}"
        )
    return reopen({name: index for index, name in enumerate(names)})


def check_labels(dataset: Any, num_classes: int) -> None:
    """Let a data set stop at, or pass over, images whose class numbers the model does not have."""
    if isinstance(dataset, CheckedImages):
        dataset.num_classes = num_classes
    elif isinstance(dataset, CachedImages):
        check_cached_labels(dataset, num_classes)
    elif isinstance(dataset, IterableImageDataset):
        dataset.target_transform = LabelCheck(num_classes)


def resolve_num_classes(given: int | None, names: list[str] | None) -> int | None:
    """Return the number of classes: as given, else as the data set has; None leaves it to the model.

    Raises:
        UserError: the two disagree.
    """
    if names and given is not None and given != len(names):
        raise UserError(
            f"num_classes is {given}, the data set has {len(names)} classes ({some(names)}); "
            "leave --num-classes out, or number the classes by --class-map"
        )
    return len(names) if names else given


def same_images(args: argparse.Namespace, train: Any, val: Any) -> tuple[float, str]:
    """Return the share of the images to validate on that are trained on too, and which they are, in words.

    Folders and archives are the same by whichever path and link they are reached, images by links to them. At most a
    thousand images are looked at.
    """
    one, other = _folder_or_archive(train), _folder_or_archive(val)
    if one is None or other is None:
        places = [(args.train_split, args.data_dir), (args.val_split, args.val_data_dir or args.data_dir)]
        return (1, f"the split {args.val_split!r} of {args.dataset}") if places[0] == places[1] else (0, "")
    if os.path.samefile(one, other):
        return 1, one if one == other else f"{other}, which is {one}"
    paths = [_paths(train), _paths(val)]
    real = {folder: os.path.realpath(folder) for part in paths for folder in set(map(os.path.dirname, part))}
    folders = [{real[folder] for folder in set(map(os.path.dirname, part))} for part in paths]
    shown = paths[1][:: math.ceil(len(paths[1]) / 1000) or 1]
    links = any(map(os.path.islink, shown + paths[0][:: math.ceil(len(paths[0]) / 1000) or 1]))
    if not (links or folders[0] & folders[1]):
        return 0, ""
    known = {_real(path, real, links) for path in paths[0]}
    both = [path for path in shown if _real(path, real, links) in known]
    return len(both) / len(shown), f"{len(both)} of {len(shown)} that were looked at, such as {both[0]}" if both else ""


def _real(path: str, folders: dict[str, str], links: bool) -> str:
    if links and os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(folders[folder], name)


def _paths(dataset: Any) -> list[str]:
    """Return the image files of a folder; none of an archive."""
    inner = getattr(dataset, "dataset", None)
    if isinstance(inner, MultiLabelImages):
        return [inner.filename(number) for number in range(len(inner))]
    samples = getattr(getattr(inner, "reader", inner), "samples", [])
    return [sample[0] for sample in samples if isinstance(sample[0], str)]


def _folder_or_archive(dataset: Any) -> str | None:
    """Return the folder of class folders, or the .tar, that a data set reads; None where it is another kind of set."""
    if isinstance(dataset, CachedImages):
        return dataset.root
    inner = getattr(dataset, "dataset", None)
    if isinstance(inner, MultiLabelImages):
        return str(inner.folder)
    reader: Any = getattr(inner, "reader", inner)
    known = type(reader) is ImageFolder or isinstance(reader, (ReaderImageFolder, ReaderImageInTar))
    return str(reader.root) if known else None


def train_loader(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], process: Any) -> Any:
    """Return timm's loader with the augmentation that `args` ask for; mixing is part of it.

    Raises:
        UserError: no such batches or augmentation can be made.
    """
    for name in ("scale", "ratio", "cutmix_minmax"):
        if (pair := getattr(args, name)) is not None and (len(pair) != 2 or pair[0] > pair[1]):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected two numbers, the smaller one first, got {' '.join(map(str, pair))}")
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
        kind = Mixup if isinstance(dataset, CachedImages) else FastCollateMixup
        collate = kind(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
    if isinstance(dataset, CachedImages):
        return _device_loader(args, dataset, data_config, process, mix=collate)
    return _create_loader(
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


def _device_loader(
    args: argparse.Namespace,
    dataset: CachedImages,
    data_config: dict[str, Any],
    process: Any,
    *,
    is_training: bool = True,
    mix: Mixup | None = None,
) -> DeviceLoader:
    if process.distributed:
        raise UserError("--cache-images is for one process; leave it out on several devices")
    loader = DeviceLoader(dataset, args, data_config, process.device, is_training=is_training)
    if mix is not None:
        loader.mix_by(mix)
    return loader


def _create_loader(dataset: Any, **settings: Any) -> Any:
    try:
        return create_loader(dataset, **settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"cannot make the batches: {type(error).__name__}: {error}") from error


def eval_loader(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], process: Any) -> Any:
    """Return timm's loader with the evaluation's crop."""
    if isinstance(dataset, CachedImages):
        return _device_loader(args, dataset, data_config, process, is_training=False)
    return _create_loader(
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
        worker_seeding=_start_worker,
        pin_memory=args.pin_mem,
        device=process.device,
        distributed=process.distributed,
    )


def _start_worker(info: Any) -> int:
    """Leave the process group of the run, and return the seed of a loading process.

    Ctrl-C and `timeout` send signals to the whole group: the run is to end its loading processes, once it has saved.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    return int(info.seed)


def end_loading(loader: Any) -> None:
    """End the loading processes of a loader that is not read any more.

    Where images are in pinned memory, torch 2.11 waits at Python's exit five seconds for each of them, one after
    another, and tells none to end.
    """
    iterator = getattr(getattr(loader, "loader", None), "_iterator", None)  # of torch's loader inside of timm's
    if iterator is not None:
        iterator._shutdown_workers()


def mixing(args: argparse.Namespace) -> bool:
    """Say whether mixup or cutmix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
