"""Images with a mask each, in ADE20K's layout: `images/SPLIT/*`, `annotations/SPLIT/*.png` and `classes.json`."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, get_worker_info
from torchvision.transforms import InterpolationMode, v2
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from visionzoo.engine.data import start_worker
from visionzoo.engine.errors import UserError, closest, printable, require
from visionzoo.engine.images import UNREADABLE, mix_seeds, to_mode
from visionzoo.engine.multi_task.flags import BatchConfig
from visionzoo.text import count_of

SCENES = "visionzoo/scenes"
UNLABELED = 255  # of a pixel; the value 0 in a file


def open_scenes(dataset: str, data_dir: str | None) -> tuple[Path, list[str]]:
    """Return the folder of a data set, and the names of its classes.

    Raises:
        UserError: it is not there, both or none are named, or its classes have no names.
    """
    if bool(dataset) == bool(data_dir):
        raise UserError(
            f"which data? give --data-dir DIR (images/, annotations/ and classes.json), or --dataset {SCENES}; got "
            f"{'both' if dataset else 'neither'}"
        )
    if dataset and dataset != SCENES:
        raise UserError(f"--dataset: unknown data set {dataset!r}; expected {SCENES}, or a folder by --data-dir")
    if dataset:
        require("sklearn")
        from visionzoo.data import scenes_folder
        from visionzoo.data.scenes import CLASSES

        try:
            return scenes_folder(), CLASSES
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
    root = Path(str(data_dir))
    path = root / "classes.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--data-dir {root}: cannot read {path}: {error}; it is a list of the classes' names, the first of which "
            "is the value 1 of the masks"
        ) from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path}: expected a list of the classes\' names, such as ["wall", "sky"], got {names!r}')
    if len(names) >= UNLABELED:
        raise UserError(f"{path}: masks of 8 bits hold at most {UNLABELED - 1} classes, got {len(names)}")
    return root, names


@dataclass(frozen=True)
class Census:
    """What the masks of a split hold.

    Attributes:
        pixels: of each class.
        images: that show each class.
    """

    pixels: Tensor
    images: Tensor


class MaskedImages(Dataset):
    """A split: each image with the class number of each pixel.

    What is random of an image follows from (seed, epoch, its number), whichever process loads it.

    Args:
        root: of the data set.
        split: name of its folders.
        num_classes: of the masks.
        data_config: input size, mean and std.
        batches: the augmentation; None for evaluation.
        seed: of what is random.

    Raises:
        UserError: there is no such split, images and masks do not pair up, or two have one name.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        num_classes: int,
        data_config: dict[str, Any],
        *,
        batches: BatchConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.num_classes, self.seed = num_classes, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loading processes outlive an epoch
        self.is_random = batches is not None and not batches.no_aug
        folders = [root / kind / split for kind in ("images", "annotations")]
        for folder in folders:
            if not folder.is_dir():
                there = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
                raise UserError(
                    f"no folder {folder}{closest(split, there)}; splits there: {', '.join(there) or 'none'}"
                )
        images, masks = (_by_name(folder) for folder in folders)
        if alone := sorted(images.keys() ^ masks.keys()):
            raise UserError(
                f"{root}, {split}: {count_of(len(alone), 'file has', 'files have')} no counterpart in images/ or "
                f"annotations/, such as {printable(alone[0])}; an image and its mask have one name"
            )
        if not images:
            raise UserError(f"no images in {folders[0]}")
        self.pairs = [(path, masks[name]) for name, path in images.items()]
        self.transform = _transform(data_config["input_size"][-2:], batches if self.is_random else None)
        self.normalize = v2.Normalize(data_config["mean"], data_config["std"])

    def __len__(self) -> int:
        return len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch whose images are read next."""
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, mask_path = self.pairs[index]
        with _opened(path, "image") as opened:
            picture = to_mode(opened, "RGB")
        pair = ImageTensor(v2.functional.to_image(picture)), Mask(torch.from_numpy(self._mask(mask_path)))
        with torch.random.fork_rng(devices=[]):
            if self.is_random:
                torch.manual_seed(mix_seeds(self.seed, int(self.epoch), index))
            image, mask = self.transform(*pair)
        pixels = self.normalize(image.as_subclass(Tensor).float() / 255)
        return pixels, mask.as_subclass(Tensor).long()

    def _mask(self, path: Path) -> np.ndarray:
        """Return the class numbers [H, W] of a mask's pixels."""
        with _opened(path, "mask") as opened:
            values = np.asarray(opened)
        if values.ndim != 2 or values.dtype != np.uint8:
            raise UserError(
                f"cannot use the mask {printable(str(path))}: expected one number of 8 bits a pixel (PIL mode L or P), "
                f"got {values.dtype} of shape {values.shape}"
            )
        if values.max() > self.num_classes:
            raise UserError(
                f"the mask {printable(str(path))} has the value {values.max()}, there are "
                f"{count_of(self.num_classes, 'class')}, 1 to {self.num_classes}, and 0 for unlabeled; fix it or "
                "classes.json"
            )
        return np.where(values == 0, UNLABELED, values - 1).astype(np.uint8)

    def census(self) -> Census:
        """Read all masks, and of the images how large they are, and count.

        Raises:
            UserError: one cannot be used, the two are not of one size, or no pixel is labeled.
        """
        pixels: Any = np.zeros(self.num_classes, np.int64)
        images: Any = np.zeros(self.num_classes, np.int64)
        for image, path in require("tqdm").tqdm(self.pairs, desc="masks", unit=" mask", leave=False):
            mask = self._mask(path)
            with _opened(image, "image") as opened:
                width, height = opened.size
            if (height, width) != mask.shape:
                raise UserError(
                    f"the mask {printable(str(path))} has {mask.shape[1]} x {mask.shape[0]} pixels, its image "
                    f"{width} x {height}; make them alike, or remove both"
                )
            counts = np.bincount(mask.ravel(), minlength=UNLABELED + 1)[: self.num_classes]
            pixels, images = pixels + counts, images + (counts > 0)
        if not pixels.any():
            raise UserError(f"no pixel of {self.pairs[0][1].parent} is labeled: all masks are 0")
        return Census(torch.from_numpy(pixels), torch.from_numpy(images))


def _by_name(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by their names without the ending.

    Raises:
        UserError: two have one name, so that it does not say which image a mask is of.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if (other := found.setdefault(path.stem, path)) != path:
            raise UserError(
                f"{printable(str(folder))}: {printable(other.name)} and {printable(path.name)} have one name; an image "
                "and its mask pair up by it: rename one, with its counterpart, or remove it"
            )
    return found


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """Open an image or a mask.

    Raises:
        UserError: it cannot be read, then or in the `with` block.
    """
    try:
        with Image.open(path) as opened:
            yield opened
    except UNREADABLE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot use the {kind} {printable(str(path))}: {error}; fix it, or remove image and mask"
        ) from error


def _transform(size: Sequence[int], batches: BatchConfig | None) -> Any:
    bilinear = InterpolationMode.BILINEAR  # masks are not interpolated
    if batches is None:
        return v2.Compose([v2.Resize(min(size), bilinear, antialias=True), v2.CenterCrop(size)])
    crop = v2.RandomResizedCrop(size, batches.scale, batches.ratio, bilinear, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(batches.hflip)])


class SceneLoader:
    """Batches of images [B, 3, H, W] and masks [B, H, W] on a device, with the attributes of timm's loaders.

    Args:
        images: the split.
        batch_size: images of a batch.
        device: of the batches.
        workers: processes that load them.
        shuffle: draw the images in random order, and leave the last batch out where it is not full.
    """

    mixup_enabled = False

    def __init__(
        self, images: MaskedImages, *, batch_size: int, device: torch.device, workers: int, shuffle: bool = False
    ) -> None:
        if shuffle and len(images) < batch_size:
            raise UserError(
                f"{count_of(len(images), 'training image does', 'training images do')} not fill one batch of "
                f"{batch_size}; give a smaller --batch-size"
            )
        self.dataset, self.device = images, device
        self.sampler: Any = RandomSampler(images) if shuffle else SequentialSampler(images)
        self.loader: DataLoader = DataLoader(
            images,
            batch_size,
            sampler=self.sampler,
            drop_last=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_begin_loading,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, masks in self.loader:
            yield images.to(self.device), masks.to(self.device)


def _begin_loading(number: int) -> None:
    torch.set_num_threads(1)
    start_worker(get_worker_info())
