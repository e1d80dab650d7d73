"""Small data sets kept decoded: in a file that all runs share, then in the device's memory, augmented there by batches.

No process loads images then, and nothing waits for them. For images of one size that are not larger than the input.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from visionzoo.engine.auto_augment import BatchAutoAugment
from visionzoo.engine.checkpoints import make_folder, write_atomically
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import AugmentationConfig, DataConfig
from visionzoo.engine.images import CheckedImages, check_label
from visionzoo.engine.options import settings
from visionzoo.text import count_of

NOT_ON_DEVICE = {  # augmentation that needs single images, by the flag's value that is without effect
    "color_jitter": (0.0,),
    "color_jitter_prob": (None, 0.0),
    "grayscale_prob": (None, 0.0),
    "gaussian_blur_prob": (None, 0.0),
    "train_crop_mode": (None, "rrc"),
    "aug_repeats": (0,),
    "train_interpolation": ("bilinear",),
}


class CachedImages(Dataset):
    """A split of a data set, decoded.

    Attributes:
        pixels: [N, H, W, C], 8 bits, as in the file.
        targets: [N], class numbers.
        root: folder or .tar that they are from.
        class_to_idx: names and numbers of the classes.
        notes: what was left out when they were read.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "about.json").read_text())
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self.targets = np.load(folder / "targets.npy")
        self.root = about["root"]
        self.class_to_idx: dict[str, int] = about["class_to_idx"]
        self.notes: list[str] = about["notes"]

    def __len__(self) -> int:
        return len(self.targets)


def open_cached(
    data: DataConfig, root: str, *, mode: str, class_map: Any, open_images: Callable[[], Any]
) -> CachedImages:
    """Return a split from `data.cache_images`, after decoding it into there where it is not.

    Args:
        data: where it is kept, and how images are read.
        root: folder or .tar.
        mode: PIL's, of the images.
        class_map: numbers of the classes, where not the data set's own.
        open_images: opens the split.

    Raises:
        UserError: an image is bad, or they are of several sizes.
    """
    said = json.dumps([os.path.realpath(root), mode, data.apply_exif_orientation, class_map, data.input_key])
    digest = hashlib.sha256(said.encode())
    paths = [Path(root)] if Path(root).is_file() else sorted(path for path in Path(root).rglob("*") if path.is_file())
    for path in paths:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    folder = Path(data.cache_images) / f"{Path(root).stem}-{digest.hexdigest()[:16]}"
    if not (folder / "about.json").exists():
        _decode(open_images(), root, folder)
    return CachedImages(folder)


def _decode(images: Any, root: str, folder: Path) -> None:
    if not isinstance(images, CheckedImages):
        raise UserError("--cache-images is for data sets whose images can be counted, not for streams")
    images.transform, targets = np.asarray, []
    pixels: Any = None
    for number in range(len(images)):
        image, target = images[number]
        image = image if image.ndim == 3 else image[..., None]
        if pixels is None:
            pixels = np.empty((len(images), *image.shape), np.uint8)
        if image.shape != pixels.shape[1:]:
            raise UserError(
                f"--cache-images needs images of one size, got {image.shape[1]} x {image.shape[0]} pixels "
                f"({images.name(number)}) after {pixels.shape[2]} x {pixels.shape[1]}; leave it out"
            )
        pixels[number] = image
        targets.append(int(target))
    if bad := images.bad_names():
        raise UserError(
            f"--cache-images: {count_of(len(bad), 'image')} cannot be used, such as {bad[0]}; fix or remove them"
        )
    make_folder(folder)
    reader: Any = getattr(images.dataset, "reader", None)
    names = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx  # of a folder, or of a .tar
    about = {"root": str(root), "class_to_idx": names, "notes": images.notes}
    write_atomically(folder / "pixels.npy", lambda file: np.save(file, pixels))
    write_atomically(folder / "targets.npy", lambda file: np.save(file, np.array(targets, np.int64)))
    write_atomically(folder / "about.json", lambda file: file.write(json.dumps(about).encode()))  # last: then it counts


class DeviceLoader:
    """Batches of cached images on a device, cropped, mirrored, erased and mixed there, with timm's loader's attributes.

    Random resized crops are timm's but for two things: a crop that would be larger than the image along an axis
    is cut to it, where timm draws again, and resizing does not round to whole pixel values.

    Args:
        images: the split.
        data_config: input size, mean, std and crop.
        device: of the batches.
        batch_size: images of a batch.
        augmentation: of training, where the last batch is dropped where it is not full; None for evaluation.

    Raises:
        UserError: images are larger than the input, or an augmentation is asked for that needs single images.
    """

    def __init__(
        self,
        images: CachedImages,
        data_config: dict[str, Any],
        device: torch.device,
        *,
        batch_size: int,
        augmentation: AugmentationConfig | None,
    ) -> None:
        self.dataset = images
        self.augmentation = None if augmentation is None or augmentation.no_aug else augmentation
        self.size: tuple[int, int] = tuple(data_config["input_size"][1:])
        sides = images.pixels.shape[1:3]
        if max(sides) > min(self.size):
            raise UserError(
                f"--cache-images: images of {sides[1]} x {sides[0]} pixels are larger than the input of {self.size[1]} "
                f"x {self.size[0]}; give a larger --img-size, or leave it out"
            )
        given = settings(self.augmentation) if self.augmentation else {}
        policy = self.augmentation.aa if self.augmentation else None
        if policy and "3a" not in policy:  # in timm, other policies leave color jitter out
            given.pop("color_jitter")
        wrong = [name for name, off in NOT_ON_DEVICE.items() if given.get(name, off[0]) not in off]
        if wrong:
            flags = ", ".join(f"--{name.replace('_', '-')} {given[name]}" for name in wrong)
            expected = ", ".join(f"{NOT_ON_DEVICE[name][0]!r}" for name in wrong)
            raise UserError(f"--cache-images does not go with {flags} (expected {expected}); leave one of them out")
        self.crop_pct, self.interpolation = data_config["crop_pct"], data_config["interpolation"]
        self.mean, self.std = (
            255 * torch.tensor(data_config[name], device=device).view(1, -1, 1, 1) for name in ("mean", "std")
        )
        # a stream of its own, as in timm's loader: what waits for the device then does not wait for the training step
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pixels = torch.from_numpy(np.array(images.pixels)).to(device)
        self.targets = torch.from_numpy(images.targets).to(device)
        is_training = augmentation is not None
        self.sampler: Any = RandomSampler(images) if is_training else SequentialSampler(images)
        self.loader = DataLoader(images, batch_size, sampler=self.sampler, drop_last=is_training)  # counts the batches
        self.erasing: RandomErasing | None = None
        if (how := self.augmentation) and how.reprob > 0:
            self.erasing = RandomErasing(how.reprob, mode=how.remode, max_count=how.recount, device=str(device))
        self.auto_augment = BatchAutoAugment(policy, data_config) if policy else None
        self.mix: Mixup | None = None
        self.mixup_enabled = False

    def mix_by(self, mix: Mixup) -> None:
        """Mix the images and labels of each batch."""
        self.mix, self.mixup_enabled = mix, True

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.tensor(list(self.sampler), device=self.pixels.device)
        size = self.loader.batch_size
        assert size is not None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(order.device))
        for start in range(0, len(self) * size, size):
            with torch.cuda.stream(self.stream):
                images, targets = self._batch(order[start : start + size])
            if self.stream is not None:
                using = torch.cuda.current_stream(order.device)
                using.wait_stream(self.stream)
                images.record_stream(using)
                targets.record_stream(using)
            yield images, targets

    def _batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        images = self.pixels[chosen].permute(0, 3, 1, 2).float()
        targets = self.targets[chosen]
        images = self._augment(images, self.augmentation) if self.augmentation else self._resize(images)
        if self.auto_augment is not None:
            images = self.auto_augment(images.round().byte()).float()
        images = (images - self.mean) / self.std
        if self.erasing is not None:
            images = self.erasing(images)
        if self.mix is not None:
            self.mix.mixup_enabled = self.mixup_enabled  # without, it still makes of labels what the loss takes
            images, targets = self.mix(images, targets)
        return images, targets

    def _augment(self, images: Tensor, how: AugmentationConfig) -> Tensor:
        batch, _, height, width = images.shape

        def draw(low: float = 0.0, high: float = 1.0) -> Tensor:
            return low + (high - low) * torch.rand(batch, device=images.device)

        if how.crop_padding:
            images = F.pad(self._resize(images), [how.crop_padding] * 4, mode="reflect")
            h, w = (images.new_full((batch,), side) for side in self.size)
        else:
            area = draw(*how.scale) * height * width
            ratio = draw(*(math.log(value) for value in how.ratio)).exp()
            h = (area / ratio).sqrt().round().clamp(1, height)
            w = (area * ratio).sqrt().round().clamp(1, width)
        height, width = images.shape[2:]
        top, left = (draw() * (height - h + 1)).floor(), (draw() * (width - w + 1)).floor()
        images = crop_and_resize(images, top, left, h, w, self.size)
        for probability, axis in ((how.hflip, -1), (how.vflip, -2)):
            if probability:
                images = torch.where((draw() < probability).view(-1, 1, 1, 1), images.flip(axis), images)
        return images

    def _resize(self, images: Tensor) -> Tensor:
        """Do as timm's transform of evaluation: the shorter side to size / crop_pct, then the middle."""
        height, width = images.shape[2:]
        target = [math.floor(side / self.crop_pct) for side in self.size]
        scale = max(target[0] / height, target[1] / width)
        sides = (round(height * scale), round(width * scale))
        if sides != (height, width):
            mode = self.interpolation if self.interpolation in ("nearest", "bilinear", "bicubic") else "bilinear"
            smooth = {} if mode == "nearest" else {"align_corners": False, "antialias": True}
            for shape in ((height, sides[1]), sides):  # one axis after the other, each in whole numbers, as PIL does
                images = F.interpolate(images, shape, mode=mode, **smooth).round().clamp(0, 255)
        top, left = ((side - size) // 2 for side, size in zip(sides, self.size, strict=True))
        return images[..., top : top + self.size[0], left : left + self.size[1]]


def crop_and_resize(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: tuple[int, int]
) -> Tensor:
    """Cut a rectangle of pixels out of each image and resize it, bilinear, without looking beyond it.

    Args:
        images: [B, C, H, W], floating point.
        top: [B], first row of each rectangle, a whole number.
        left: [B], first column.
        height: [B], rows.
        width: [B], columns.
        size: height and width of the result, at least those of the rectangles for results without aliasing.

    Returns:
        [B, C, *size].
    """

    def places(start: Tensor, length: Tensor, count: int, side: int) -> Tensor:
        steps = (torch.arange(count, device=images.device) + 0.5) / count
        inside = (steps * length[:, None] - 0.5).clamp(min=0).minimum(length[:, None] - 1)
        return (start[:, None] + inside + 0.5) * 2 / side - 1  # where -1 and 1 are the image's borders

    y = places(top, height, size[0], images.shape[2])[:, :, None].expand(-1, -1, size[1])
    x = places(left, width, size[1], images.shape[3])[:, None].expand(-1, size[0], -1)
    return F.grid_sample(images, torch.stack([x, y], -1), "bilinear", "border", align_corners=False)


def check_cached_labels(images: CachedImages, num_classes: int) -> None:
    """Raise UserError where a class number is out of range."""
    try:
        check_label(int(images.targets.max()), num_classes)
    except ValueError as error:
        raise UserError(f"an image cannot be used: {error}; fix the data set") from error
