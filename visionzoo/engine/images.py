"""Images as a data set that is honest about files that cannot be read, and that repeats itself exactly."""

import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from PIL import Image, ImageOps
from timm.data import ImageDataset
from torch.utils.data import Dataset, RandomSampler, get_worker_info

from visionzoo.engine.errors import UnreadableImageError, UserError, printable
from visionzoo.engine.multilabel import MultiLabelImages
from visionzoo.text import count_of, some

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
NONE = "no image of the data set can be used"
SIXTEEN_BITS = ("PNG", "PPM")  # whose pixels of 16 bits are in 32 where Pillow is old
IGNORED = -1  # class of a blank image that stands in for an unreadable one at evaluation


def to_mode(image: Image.Image, mode: str, *, upright: bool = False) -> Image.Image:
    """Decode a picture into one of 8 bits a channel: the first of an animation, 16 bits by their upper half.

    Args:
        image: as opened.
        mode: PIL's name, `RGB` or `L`.
        upright: turn and mirror it as its EXIF orientation says; else, as in timm, it stays as it is stored.

    Raises:
        OSError, ...: those of `UNREADABLE`; ValueError also for pixels of 32 bits, which have no agreed range.
    """
    turned = ImageOps.exif_transpose(image) if upright else image
    if image.mode[0] in "IF" and mode[0] not in "IF":
        if not image.mode.startswith("I;16") and image.format not in SIXTEEN_BITS:
            raise ValueError(f"pixels of 32 bits ({image.mode}) have no agreed range; store 8 or 16 bits")
        turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))  # Pillow's convert would cut off at 255
    if turned.mode != mode:
        return turned.convert(mode)
    turned.load()  # convert would hold a second copy of a large picture
    return turned


def readable_images(
    paths: Iterable[Path], mode: str, *, upright: bool, skipped: list[str] | None
) -> Iterator[tuple[Path, Image.Image]]:
    """Yield the images of files with their paths.

    Args:
        paths: of the files.
        mode: see `read_image`.
        upright: see `read_image`.
        skipped: gets what is wrong with an unreadable one, which is skipped; None to stop at it.

    Raises:
        UnreadableImageError: one is unreadable, and `skipped` is None.
    """
    for path in paths:
        try:
            image = read_image(path, mode, upright=upright)
        except UnreadableImageError as error:
            if skipped is None:
                raise
            skipped.append(f"{path}: {error.__cause__}")
            continue
        yield path, image


def read_image(path: Path, mode: str, *, upright: bool = False) -> Image.Image:
    """Return the picture of a file that a command names, as `to_mode` does.

    Raises:
        UnreadableImageError: it cannot be used.
    """
    try:
        with Image.open(path) as image:
            return to_mode(image, mode, upright=upright)
    except UNREADABLE as error:
        raise UnreadableImageError(
            f"cannot use the image {path}: {error}; fix or leave it out, or pass --skip-bad-images"
        ) from error


def skipped_images(skipped: Sequence[str]) -> str:
    """Return how many images `readable_images` skipped, in words."""
    return f"{count_of(len(skipped), 'unreadable image was', 'unreadable images were')} skipped"


class CheckedImages(Dataset):
    """A timm or torchvision data set whose bad images stop the run by name, or are skipped and counted.

    Bad are those that cannot be read or whose class number is out of range. When skipped, a training image is
    replaced by the next good one, an evaluation image by a blank one of class `IGNORED`. Loading processes draw
    augmentation from (seed, epoch, rank, worker), so that a run continued from a checkpoint sees the images it
    would have seen.

    Attributes:
        num_classes: of the model, once that is known.
        notes: what was left out without a reason to stop.
        class_to_idx: names and numbers of the classes where they are not the data set's own.
    """

    def __init__(
        self, dataset: Any, *, mode: str, is_training: bool, skip_bad: bool, seed: int, upright: bool = False
    ) -> None:
        self.dataset = dataset
        self.mode = mode
        self.is_training = is_training
        self.skip_bad = skip_bad
        self.seed = seed
        self.upright = upright
        self.num_classes: int | None = None
        self.notes: list[str] = []
        self.class_to_idx: dict[str, int] | None = None
        self._numbers: dict[int, int] | None = None
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.transform: Any = None  # set by timm's create_loader
        # shared with the loading processes, which outlive an epoch
        self.bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._seeded_epoch = -1

    def __len__(self) -> int:
        return len(self.dataset)

    def renumber(self, class_to_idx: dict[str, int], name: str) -> None:
        """Give the classes other numbers than the data set, called `name`, does.

        Raises:
            UserError: its classes have no names, or others.
        """
        own = getattr(self.dataset, "class_to_idx", None)
        if not own or (strangers := sorted(map(str, set(own) - set(class_to_idx)))):
            what = f"has classes that are not in it: {some(strangers)}" if own else "has no names of classes"
            raise UserError(f"{name} cannot be numbered by the class map, it {what}")
        self.class_to_idx = dict(class_to_idx)
        self._numbers = {number: class_to_idx[name] for name, number in own.items()}

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
        raise UnreadableImageError(NONE)

    def _ignored(self) -> Any:
        several = isinstance(self.dataset, MultiLabelImages)
        return np.full(len(self.dataset.class_to_idx), IGNORED) if several else IGNORED

    def _read(self, index: int) -> tuple[Image.Image, Any] | None:
        try:
            if isinstance(self.dataset, ImageDataset):
                stream, target = self.dataset.reader[index]
                with stream, Image.open(stream) as opened:
                    image = to_mode(opened, self.mode, upright=self.upright)
            else:
                image, target = self.dataset[index]
                image = to_mode(image, self.mode, upright=self.upright)
            return image, self._checked(target)
        except UNREADABLE as error:
            self.bad[index] = True
            if self.skip_bad:
                return None
            raise UnreadableImageError(self._complaint(index, error)) from error

    def _checked(self, target: Any) -> Any:
        if isinstance(target, np.ndarray):
            return target
        number = IGNORED if target is None else int(target)
        if self._numbers is not None:
            number = self._numbers.get(number, number)
        if self.num_classes is not None and not (number == IGNORED and not self.is_training):
            check_label(number, self.num_classes)
        return number

    def _complaint(self, index: int, error: Exception) -> str:
        return f"cannot use the image {self.name(index)}: {error}; fix or remove it, or pass --skip-bad-images"

    def name(self, index: int) -> str:
        """Return the file name of an image, printable, or its number where the data set knows no files."""
        name = None
        if isinstance(self.dataset, MultiLabelImages):
            name = self.dataset.filename(index)
        elif isinstance(self.dataset, ImageDataset) and (found := self.dataset.filename(index)):
            name = str(Path(self.dataset.reader.root or "") / found)
        return printable(name) if name else f"number {index}"

    def bad_names(self) -> list[str]:
        """Return the names of all bad images met so far."""
        return [self.name(int(index)) for index in self.bad.nonzero()]

    def raise_first_bad(self) -> None:
        """Raise UnreadableImageError for an image that a loading process met, in words free of its traceback."""
        if self.bad.all():
            raise UnreadableImageError(NONE)
        for index in self.bad.nonzero():
            self._read(int(index))


class LabelCheck:
    """Passes class numbers of a stream on, and stops at one that is out of range."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, label: Any) -> Any:
        """Return the label.

        Raises:
            UserError: it is out of range.
        """
        try:
            check_label(int(label), self.num_classes)
        except ValueError as error:
            raise UserError(f"an image of the stream cannot be used: {error}; fix the data set") from error
        return label


def check_label(number: int, num_classes: int) -> None:
    """Raise ValueError where a class number is out of range: on a GPU, the loss would end the process silently."""
    if not 0 <= number < num_classes:
        raise ValueError(f"its class is number {number}, the model has {num_classes}, from 0 to {num_classes - 1}")


def announce_epoch(loader: Any, seed: int, epoch: int) -> None:
    """Let order and augmentation of a loader's next pass follow from (seed, epoch), whatever ran before."""
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    # Samplers of several processes shuffle only by the epoch's number, all others by torch's global state, of which
    # more is drawn where loading processes start anew. Seeded alike, any number of them makes the same batches.
    if isinstance(loader.sampler, RandomSampler):
        loader.sampler.generator = torch.Generator().manual_seed(mix_seeds(seed, epoch))
    elif hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(mix_seeds(seed, epoch))
    loader.loader.generator = torch.Generator().manual_seed(
        mix_seeds(seed, epoch)
    )  # timm's prefetcher wraps the loader


def batch_names(loader: Any, seed: int, epoch: int, index: int) -> list[str]:
    """Return the names of the images of a batch of an epoch, in this process; none where the data set is a stream."""
    if not isinstance(loader.dataset, CheckedImages) or loader.loader.batch_size is None:
        return []
    announce_epoch(loader, seed, epoch)
    size = loader.loader.batch_size
    return [loader.dataset.name(image) for image in list(loader.sampler)[index * size : (index + 1) * size]]


def batches(loader: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches of a loader; what a loading process raises is reported without its traceback.

    On a GPU, memory of a batch that was given back is not written to before all that reads it has run. timm 1.0.29
    writes there at once, on a stream of its own, images that it normalizes later.
    """
    try:
        for batch in loader:
            for tensor in batch:
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            yield batch
    except UnreadableImageError:
        loader.dataset.raise_first_bad()
        raise
    except UserError as error:
        raise UserError(
            str(error).strip().splitlines()[-1].removeprefix("visionzoo.engine.errors.UserError: ")
        ) from error


def loading_death(error: Exception) -> UserError | None:
    """Return torch's error in a user's words where it says that a process that loads images has died, else None."""
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in str(error):
        return None
    return UserError(
        f"a process that loads images has died: {str(error).strip().rstrip('.')}. If memory ran out (the system's log "
        "tells), fewer --workers or a smaller --batch-size need less"
    )


def seed_everything(*numbers: int) -> None:
    """Seed random, numpy and torch with a mix of the numbers."""
    seed = mix_seeds(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def mix_seeds(*numbers: int) -> int:
    """Return a seed that follows from the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
