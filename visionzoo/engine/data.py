"""Data sets and loaders: timm's, checked before training starts."""

import dataclasses
import functools
import math
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import FastCollateMixup, IterableImageDataset, Mixup, create_dataset, create_loader, create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import IterableDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import RandomCrop

from visionzoo.engine._compat import timm_patched
from visionzoo.engine.cached import CachedImages, DeviceLoader, check_cached_labels, open_cached
from visionzoo.engine.errors import UserError, require
from visionzoo.engine.flags import AugmentationConfig, DataConfig, InputConfig, ModelConfig, TrainConfig
from visionzoo.engine.folders import find_split, look_at_classes
from visionzoo.engine.images import CheckedImages, LabelCheck
from visionzoo.engine.interruption import outlive_signals
from visionzoo.engine.multilabel import TABLE, MultiLabelImages
from visionzoo.engine.names import read_class_map
from visionzoo.text import count_of, some

EMBEDDED = ("visionzoo/digits",)
READERS = ("torch", "hfds", "hfids", "tfds", "wds")  # timm's, by what stands before the / of --dataset
FOLDERS = ("", "imagefolder", "image_folder", "folder", "tar")  # names for images in folders or in a .tar
MODES = {"L": 1, "LA": 2, "RGB": 3, "YCbCr": 3, "HSV": 3, "LAB": 3, "RGBA": 4, "CMYK": 4, "I": 1, "F": 1}  # channels


def input_channels(model: ModelConfig, input: InputConfig) -> int:
    """Return the channels of the images that a model is given."""
    return input.input_size[0] if input.input_size else model.in_chans or 3


def image_mode(channels: int, mode: str | None) -> str:
    """Return the PIL mode of the input images: as given, else the usual one of as many channels.

    Raises:
        UserError: PIL has no such mode, or it has not as many channels as the model takes.
    """
    mode = mode or ("RGB" if channels == 3 else "L")
    if mode not in MODES:
        raise UserError(f"--input-img-mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if MODES[mode] != channels:
        raise UserError(
            f"the model takes {count_of(channels, 'channel')} (--in-chans, --input-size), images of mode {mode} have "
            f"{MODES[mode]}; --input-img-mode names another"
        )
    return mode


def open_split(
    data: DataConfig,
    *,
    is_training: bool,
    split: str,
    root: str | None,
    channels: int,
    seed: int,
    batch_size: int,
    num_samples: int | None = None,
    repeats: float = 0,
    class_map: Any = "",
) -> Any:
    """Open one split as timm does, wrapped in CheckedImages unless it is streamed.

    Args:
        data: the data set, and how its images are read.
        is_training: whether they are shuffled where they are streamed.
        split: name of the split.
        root: folder or .tar, for data sets that have one.
        channels: of the images.
        seed: of the order of a stream, and of what takes the place of bad images.
        batch_size: images of a batch, to whole numbers of which a stream is cut.
        num_samples: length of a stream.
        repeats: of a stream in an epoch.
        class_map: file of class names, or their numbers by name.

    Raises:
        UserError: the data set, the split or its images are not there.
    """
    name = data.dataset
    mode = image_mode(channels, data.input_img_mode)
    if name.startswith("visionzoo/"):
        given, root = root, _embedded(name)
        if given:
            raise UserError(
                f"--dataset {name} comes with visionzoo, and the images in {given} would not be read; leave --data-dir "
                "out, or give --dataset ''"
            )
        name = ""
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
        mode=mode,
        is_training=is_training,
        skip_bad=data.skip_bad_images,
        seed=seed,
        upright=data.apply_exif_orientation,
    )
    if data.multi_label:
        if name:
            raise UserError(f"--multi-label reads folders with a {TABLE}; leave --dataset {name} out")
        return checked(MultiLabelImages(Path(str(root)), class_map or None))
    if data.cache_images:
        if name:
            raise UserError(f"--cache-images is for images in folders and .tar files; leave it or --dataset {name} out")
        assert root is not None
        without = dataclasses.replace(data, cache_images="", dataset="")

        def open_images() -> Any:
            return open_split(
                without,
                is_training=is_training,
                split=split,
                root=root,
                channels=channels,
                seed=seed,
                batch_size=batch_size,
                class_map=class_map,
            )

        return open_cached(data, root, mode=mode, class_map=class_map, open_images=open_images)
    notes: list[str] = []
    if not name and root and Path(root).is_dir():
        class_map, notes = look_at_classes(data, Path(root), class_map, is_training)
    try:
        dataset: Any = create_dataset(
            name,
            root=root,
            split=split,
            search_split=bool(prefix),
            is_training=is_training,
            class_map=class_map,
            download=data.dataset_download,
            batch_size=batch_size,
            seed=seed,
            repeats=repeats,  # type: ignore[arg-type]  # any number
            input_img_mode=mode,
            input_key=data.input_key,
            target_key=data.target_key,
            num_samples=num_samples,
            trust_remote_code=data.dataset_trust_remote_code,
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


def open_train_and_val(config: TrainConfig) -> tuple[Any, Any | None]:
    """Open the two splits, with the same numbers for the same classes.

    Raises:
        UserError: as open_split; or the two would be the same images, or validation has classes of its own.
    """
    opened = functools.partial(
        open_split,
        config.data,
        channels=input_channels(config.model, config.input),
        seed=config.device.seed,
        batch_size=config.fit.batch_size,
        repeats=config.splits.epoch_repeats,
    )
    train = opened(
        is_training=True,
        split=config.splits.train_split,
        root=config.data.data_dir,
        num_samples=config.splits.train_num_samples,
        class_map=config.data.class_map,
    )
    names = class_names(train)
    if names and len(names) == 1 and not config.data.multi_label:
        raise UserError(f"all training images are of one class, {names[0]!r}: there is nothing to distinguish")
    if not config.splits.val_split:
        return train, None

    def open_val(class_map: Any) -> Any:
        return opened(
            is_training=False,
            split=config.splits.val_split,
            root=config.splits.val_data_dir or config.data.data_dir,
            num_samples=config.splits.val_num_samples,
            class_map=class_map,
        )

    val = open_val(config.data.class_map)
    share, shared = same_images(config, train, val)
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
            f"{count_of(len(strangers), 'class of the evaluated images was', 'classes of the evaluated images were')} "
            f"not trained on: {some(strangers)}; "
            f"the training had {some(names)}"
        )
    return reopen({name: index for index, name in enumerate(names)})


def check_labels(dataset: Any, num_classes: int) -> None:
    """Let a data set stop at, or skip, images whose class numbers the model does not have."""
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
            f"num_classes is {given}, the data set has {count_of(len(names), 'class')} ({some(names)}); "
            "leave --num-classes out, or number the classes by --class-map"
        )
    return len(names) if names else given


def same_images(config: TrainConfig, train: Any, val: Any) -> tuple[float, str]:
    """Return the share of the images to validate on that are trained on too, and which they are, in words.

    Folders and archives are the same by whichever path and link they are reached, images by links to them. At most a
    thousand images are looked at.
    """
    one, other = _folder_or_archive(train), _folder_or_archive(val)
    if one is None or other is None:
        places = [
            (config.splits.train_split, config.data.data_dir),
            (config.splits.val_split, config.splits.val_data_dir or config.data.data_dir),
        ]
        return (
            (1, f"the split {config.splits.val_split!r} of {config.data.dataset}")
            if places[0] == places[1]
            else (0, "")
        )
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


def check_ranges(flags: Any, *names: str) -> None:
    """Refuse flags of two numbers whose larger one comes first.

    Raises:
        UserError: it names the flag.
    """
    for name in names:
        if (pair := getattr(flags, name)) is not None and (len(pair) != 2 or pair[0] > pair[1]):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected two numbers, the smaller one first, got {' '.join(map(str, pair))}")


def train_loader(config: TrainConfig, dataset: Any, data_config: dict[str, Any], process: Any) -> Any:
    """Return timm's loader with the augmentation that `config` asks for; mixing is part of it.

    Raises:
        UserError: no such batches or augmentation can be made.
    """
    augmentation, batch_size = config.augmentation, config.fit.batch_size
    check_ranges(augmentation, "scale", "ratio", "cutmix_minmax")
    _check_crop_padding(augmentation, data_config["input_size"][1:])
    if not isinstance(dataset, IterableDataset) and len(dataset) < batch_size * process.world_size:
        raise UserError(
            f"{count_of(len(dataset), 'training image does', 'training images do')} not fill one batch of "
            f"{batch_size} on {process.world_size} "
            "device(s); give a smaller --batch-size"
        )
    if augmentation.aug_repeats and not process.distributed:
        raise UserError("--aug-repeats needs several processes (torchrun --nproc-per-node N ...); leave it out on one")
    collate = None
    if mixing(augmentation):
        if config.data.multi_label:
            raise UserError("--multi-label does not go with mixup and cutmix; leave --mixup and --cutmix out")
        if batch_size % 2:
            raise UserError(f"mixup and cutmix need an even --batch-size, got {batch_size}")
        kind = Mixup if isinstance(dataset, CachedImages) else FastCollateMixup
        collate = kind(
            mixup_alpha=augmentation.mixup,
            cutmix_alpha=augmentation.cutmix,
            cutmix_minmax=augmentation.cutmix_minmax,
            prob=augmentation.mixup_prob,
            switch_prob=augmentation.mixup_switch_prob,
            mode=augmentation.mixup_mode,
            label_smoothing=augmentation.smoothing,
            num_classes=config.model.num_classes,
        )
    if isinstance(dataset, CachedImages):
        loader = _device_loader(dataset, data_config, process, batch_size, augmentation)
        if collate is not None:
            loader.mix_by(collate)
        return loader
    loader = _create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=batch_size,
        is_training=True,
        **transform_settings(augmentation, data_config),
        num_aug_repeats=augmentation.aug_repeats,
        collate_fn=collate,
        **_common(config.data, data_config, process),
    )
    if augmentation.crop_padding:
        dataset.transform.transforms[:1] = _padded_crop(data_config, augmentation.crop_padding)
    return loader


def transform_settings(augmentation: AugmentationConfig, data_config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of timm's transform of training images."""
    return dict(
        no_aug=augmentation.no_aug,
        re_prob=augmentation.reprob,
        re_mode=augmentation.remode,
        re_count=augmentation.recount,
        train_crop_mode=augmentation.train_crop_mode,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        vflip=augmentation.vflip,
        color_jitter=augmentation.color_jitter or None,  # at 0 timm's does nothing, slowly
        color_jitter_prob=augmentation.color_jitter_prob,
        grayscale_prob=augmentation.grayscale_prob,
        gaussian_blur_prob=augmentation.gaussian_blur_prob,
        auto_augment=augmentation.aa,
        interpolation=data_config["interpolation"] if augmentation.no_aug else augmentation.train_interpolation,
    )


def _check_crop_padding(augmentation: AugmentationConfig, size: tuple[int, int]) -> None:
    if not augmentation.crop_padding:
        return
    if augmentation.no_aug or augmentation.train_crop_mode:
        other = "--no-aug" if augmentation.no_aug else f"--train-crop-mode {augmentation.train_crop_mode}"
        raise UserError(f"--crop-padding does not go with {other}; leave one of them out")
    if augmentation.crop_padding >= min(size):  # there are no more pixels to mirror
        raise UserError(
            f"--crop-padding: expected fewer pixels than the input's {min(size)}, got {augmentation.crop_padding}"
        )


def _padded_crop(data_config: dict[str, Any], padding: int) -> list[Any]:
    """Return the transforms of --crop-padding, which take the place of timm's random resized crop."""
    size = data_config["input_size"][1:]
    crop = {name: data_config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    *evaluation, _to_tensor = create_transform(size, use_prefetcher=True, **crop).transforms  # type: ignore[union-attr]
    return [*evaluation, RandomCrop(size, padding, padding_mode="reflect")]


def _device_loader(
    dataset: CachedImages,
    data_config: dict[str, Any],
    process: Any,
    batch_size: int,
    augmentation: AugmentationConfig | None,
) -> DeviceLoader:
    if process.distributed:
        raise UserError("--cache-images is for one process; leave it out on several devices")
    return DeviceLoader(dataset, data_config, process.device, batch_size=batch_size, augmentation=augmentation)


def _create_loader(dataset: Any, **settings: Any) -> Any:
    try:
        with timm_patched():
            return create_loader(dataset, **settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"cannot make the batches: {type(error).__name__}: {error}") from error


def eval_loader(data: DataConfig, dataset: Any, data_config: dict[str, Any], process: Any, *, batch_size: int) -> Any:
    """Return timm's loader with the evaluation's crop."""
    if isinstance(dataset, CachedImages):
        return _device_loader(dataset, data_config, process, batch_size, None)
    return _create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        **_common(data, data_config, process),
    )


def _common(data: DataConfig, data_config: dict[str, Any], process: Any) -> dict[str, Any]:
    return dict(
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=data.workers,
        worker_seeding=start_worker,
        pin_memory=data.pin_mem,
        device=process.device,
        distributed=process.distributed,
    )


def start_worker(info: Any) -> int:
    """Leave what ends runs by signals to the run, and return the seed of a loading process.

    Ctrl-C and `timeout` send them to the whole process group, schedulers to all processes of a job.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    outlive_signals()
    return int(info.seed)


def end_loading(loader: Any) -> None:
    """End the loading processes of a loader; where it is read again it starts others.

    Where images are in pinned memory, torch 2.11 waits at Python's exit five seconds for each of them, one after
    another, and tells none to end.
    """
    inner: Any = getattr(loader, "loader", None)  # torch's loader inside of timm's
    iterator = getattr(inner, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()
        inner._iterator = None


def mixing(augmentation: AugmentationConfig) -> bool:
    """Say whether mixup or cutmix is on."""
    return augmentation.mixup > 0 or augmentation.cutmix > 0 or augmentation.cutmix_minmax is not None
