"""Images as a data set that is honest about files that cannot be read, and that repeats itself exactly."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from PIL import Image, ImageOps
from timm.data import ImageDataset
from timm.data.auto_augment import NAME_TO_OP
from torch.utils.data import Dataset, RandomSampler, get_worker_info

from visionzoo.engine.errors import UnreadableImageError
from visionzoo.engine.multilabel import MultiLabelImages

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
IGNORED = -1  # class of a blank image that stands in for an unreadable one at evaluation


class CheckedImages(Dataset):
    """A timm or torchvision data set whose unreadable images stop the run by name, or are passed over and counted.

    When passed over, a training image is replaced by the next readable one, an evaluation image by a blank one of
    class `IGNORED`. Loading processes draw augmentation from (seed, epoch, rank, worker), so that a run that goes on
    from a checkpoint sees the images that it would have seen.
    """

    def __init__(self, dataset: Any, *, mode: str, is_training: bool, skip_bad: bool, seed: int) -> None:
        self.dataset = dataset
        self.mode = mode
        self.is_training = is_training
        self.skip_bad = skip_bad
        self.seed = seed
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.transform: Any = None  # set by timm's create_loader
        # shared with the loading processes, which outlive an epoch
        self.bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._seeded_epoch = -1

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch whose images are read next."""
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        worker = get_worker_info()
        if worker is not None and self._seeded_epoch != int(self.epoch):
            self._seeded_epoch = int(self.epoch)
            seed_everything(self.seed, self._seeded_epoch, self.rank, worker.id, 1)  # 1: apart from the steps' seeds
        if not self.is_training:
            image, target = self._read(index) or (Image.new(self.mode, (64, 64)), self._ignored())
        else:
            image, target = next(found for i in self._from(index) if (found := self._read(i)))
        return self.transform(image), target

    def _from(self, index: int) -> Iterator[int]:
        yield from range(index, len(self))
        yield from range(index)
        raise UnreadableImageError("not one image of the data set can be read")

    def _ignored(self) -> Any:
        several = isinstance(self.dataset, MultiLabelImages)
        return np.full(len(self.dataset.class_to_idx), IGNORED) if several else IGNORED

    def _read(self, index: int) -> tuple[Image.Image, Any] | None:
        try:
            if isinstance(self.dataset, ImageDataset):
                stream, target = self.dataset.reader[index]
                with stream, Image.open(stream) as opened:
                    image = opened.convert(self.mode)  # decodes, so that a truncated file shows here
            else:
                image, target = self.dataset[index]
                image = image.convert(self.mode)
        except UNREADABLE as error:
            self.bad[index] = True
            if self.skip_bad:
                return None
            raise UnreadableImageError(self._complaint(index, error)) from error
        if isinstance(target, np.ndarray):
            return image, target
        return image, IGNORED if target is None else int(target)

    def _complaint(self, index: int, error: Exception) -> str:
        return f"cannot read the image {self.name(index)}: {error}; mend or remove it, or pass --skip-bad-images"

    def name(self, index: int) -> str:
        """Return the file name of an image, or its number where the data set knows no files."""
        if isinstance(self.dataset, MultiLabelImages):
            return self.dataset.filename(index)
        if not isinstance(self.dataset, ImageDataset):
            return f"number {index}"
        name = self.dataset.filename(index, absolute=True)
        return str(Path(self.dataset.reader.root or "") / name) if name else f"number {index}"

    def bad_names(self) -> list[str]:
        """Return the names of all images met so far that could not be read."""
        return [self.name(int(index)) for index in self.bad.nonzero()]

    def raise_first_bad(self) -> None:
        """Raise UnreadableImageError for an image that a loading process met, in words free of its traceback."""
        if self.bad.all():
            raise UnreadableImageError("not one image of the data set can be read")
        for index in self.bad.nonzero():
            self._read(int(index))


def announce_epoch(loader: Any, seed: int, epoch: int) -> None:
    """Let order and augmentation of a loader's next pass follow from (seed, epoch), whatever ran before."""
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    # Samplers of several processes shuffle by the epoch's number alone, all others by torch's global state, of which
    # more is drawn where loading processes start anew. Seeded alike, any number of them makes the same batches.
    if isinstance(loader.sampler, RandomSampler):
        loader.sampler.generator = torch.Generator().manual_seed(_mix(seed, epoch))
    elif hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(_mix(seed, epoch))
    loader.loader.generator = torch.Generator().manual_seed(_mix(seed, epoch))  # timm's prefetcher wraps the loader


def batch_names(loader: Any, seed: int, epoch: int, index: int) -> list[str]:
    """Return the names of the images of a batch of an epoch, in this process; none where the data set is a stream."""
    if not isinstance(loader.dataset, CheckedImages) or loader.loader.batch_size is None:
        return []
    announce_epoch(loader, seed, epoch)
    size = loader.loader.batch_size
    return [loader.dataset.name(image) for image in list(loader.sampler)[index * size : (index + 1) * size]]


def batches(loader: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches of a loader; an unreadable image is reported as UnreadableImageError with its name alone."""
    try:
        yield from loader
    except UnreadableImageError:
        loader.dataset.raise_first_bad()
        raise


def seed_everything(*numbers: int) -> None:
    """Seed random, numpy and torch with a mix of the numbers."""
    seed = _mix(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Do as timm's augmentation of that name; at its strongest, 0 bits, the image is black, which Pillow 13 refuses."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    NAME_TO_OP[_name] = posterize


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
