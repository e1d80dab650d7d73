import io
import tarfile
import threading

import numpy as np
import pytest
import torch
from engine.helpers import truncate, write_images
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, AugmentOp, RandAugment, rand_augment_transform

from visionzoo.data import digits
from visionzoo.engine._compat import posterize, timm_patched
from visionzoo.engine.data import (
    class_names,
    eval_loader,
    open_train_and_val,
    resolve_num_classes,
    train_loader,
)
from visionzoo.engine.errors import UnreadableImageError, UserError
from visionzoo.engine.images import IGNORED, announce_epoch, batches
from visionzoo.engine.parallel import Process

CPU = Process(torch.device("cpu"))
CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def pack(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=folder.name)
    return str(path)


def test_both_splits_are_found_with_their_classes(make_args):
    train, val = open_train_and_val(make_args())
    assert (len(train), len(val)) == (36, 9)
    assert class_names(train) == class_names(val) == ["blue", "green", "red"]


def test_two_tar_files_are_the_splits(make_args, images, tmp_path):
    args = make_args(
        data_dir=pack(images / "train", tmp_path / "a.tar"),
        val_data_dir=pack(images / "validation", tmp_path / "b.tar"),
    )
    train, val = open_train_and_val(args)
    assert (len(train), len(val), class_names(val)) == (36, 9, ["blue", "green", "red"])
    loaded = next(iter(batches(train_loader(args, train, CONFIG, CPU))))
    assert loaded[0].shape == (8, 3, 32, 32)


def test_torchvision_sets_are_read_too(make_args, monkeypatch):
    class Fake(torch.utils.data.Dataset):
        class_to_idx = {"cat": 0, "dog": 1}

        def __init__(self, root, train, download):
            self.train = train

        def __len__(self):
            return 20

        def __getitem__(self, index):
            return Image.new("L", (28, 28), index), index % 2

    monkeypatch.setattr("timm.data.dataset_factory._TORCH_BASIC_DS", {"mnist": Fake})
    args = make_args(dataset="torch/mnist", data_dir="anywhere")
    train, val = open_train_and_val(args)
    assert class_names(train) == ["cat", "dog"]
    assert train.dataset.train and not val.dataset.train
    pixels, targets = next(iter(batches(eval_loader(args.data, val, CONFIG, CPU, batch_size=args.fit.batch_size))))
    assert pixels.shape == (8, 3, 32, 32)
    assert targets.tolist() == [0, 1] * 4


def test_a_class_without_validation_images_keeps_the_numbers_of_the_others(make_args, tmp_path):
    write_images(tmp_path / "d/train", per_class=2, seed=0)
    write_images(tmp_path / "d/val", per_class=2, seed=1)
    for file in (tmp_path / "d/val/blue").iterdir():
        file.unlink()
    train, val = open_train_and_val(make_args(data_dir=str(tmp_path / "d")))
    assert class_names(train) == class_names(val)
    assert {val[i][1] for i in range(len(val)) if not setattr(val, "transform", np.asarray)} == {1, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_dir": None}, "give --data-dir, or --dataset visionzoo/digits"),
        ({"data_dir": "nowhere"}, "no data at nowhere"),
        ({"dataset": "visionzoo/digit"}, "unknown embedded data set 'visionzoo/digit'; there is visionzoo/digits"),
        ({"dataset": "torch/mnist5"}, "Unknown torchvision dataset mnist5"),
        ({"class_map": "nowhere.txt"}, "nowhere.txt"),
        ({"val_split": "test"}, "no 'test' split in"),
    ],
)
def test_data_that_is_not_there_is_named(make_args, change, message):
    with pytest.raises(UserError) as error:
        open_train_and_val(make_args(**change))
    assert message in str(error.value)


def test_a_folder_without_images_is_refused(make_args, images, tmp_path):
    (tmp_path / "d/train/cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Found 0 images in subfolders of .*d/train"):
        open_train_and_val(make_args(data_dir=str(tmp_path / "d")))
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError, match=r"cannot open the 'train' split of .*e\.tar"):
        open_train_and_val(make_args(data_dir=pack(tmp_path / "e", tmp_path / "e.tar")))
    (tmp_path / "f.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"f\.tar"):
        open_train_and_val(make_args(data_dir=str(tmp_path / "f.tar")))


def test_validating_on_the_training_images_is_refused(make_args, images):
    with pytest.raises(UserError, match="would read the same images"):
        open_train_and_val(make_args(data_dir=str(images / "train")))
    train, val = open_train_and_val(make_args(data_dir=str(images / "train"), val_split=""))
    assert len(train) == 36 and val is None


def test_a_missing_validation_folder_is_not_replaced_by_the_training_one(make_args, tmp_path):
    write_images(tmp_path / "d/train", per_class=2, seed=0)
    with pytest.raises(UserError, match=r"no 'validation' split in .*; its folders are train"):
        open_train_and_val(make_args(data_dir=str(tmp_path / "d")))


def test_validation_classes_unknown_to_training_are_named(make_args, images, tmp_path):
    write_images(tmp_path / "val", per_class=1, seed=1)
    (tmp_path / "val/red").rename(tmp_path / "val/crimson")
    with pytest.raises(UserError, match="not trained on: crimson; the training had blue, green, red"):
        open_train_and_val(make_args(val_data_dir=str(tmp_path / "val")))


def test_number_of_classes_comes_from_the_data_or_agrees_with_it():
    assert resolve_num_classes(None, ["a", "b"]) == 2
    assert resolve_num_classes(2, ["a", "b"]) == 2
    assert resolve_num_classes(7, None) == 7
    with pytest.raises(UserError, match=r"num_classes is 5, the data set has 2 classes \(a, b\)"):
        resolve_num_classes(5, ["a", "b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 40}, "36 training images do not fill one batch of 40"),
        ({"batch_size": 9, "mixup": 0.8}, "need an even --batch-size, got 9"),
        ({"aug_repeats": 3}, "--aug-repeats needs several processes"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(make_args, change, message):
    args = make_args(num_classes=3, **change)
    with pytest.raises(UserError, match=message):
        train_loader(args, open_train_and_val(args)[0], CONFIG, CPU)


@pytest.fixture
def damaged(make_args, tmp_path):
    """A copy of the images with a truncated, an empty and a false one in training, a truncated one in validation."""
    root = tmp_path / "damaged"
    write_images(root / "train", per_class=6, seed=0)
    write_images(root / "validation", per_class=2, seed=1)
    truncate(root / "train/blue/0.png")
    (root / "train/green/3.png").write_bytes(b"")
    (root / "train/red/5.png").write_text("no image")
    truncate(root / "validation/red/0.png")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_with_its_name(make_args, damaged, workers):
    args = make_args(data_dir=str(damaged), workers=workers, batch_size=6)
    train, val = open_train_and_val(args)
    for loader, names in (
        (train_loader(args, train, CONFIG, CPU), ("blue/0.png", "green/3.png", "red/5.png")),
        (eval_loader(args.data, val, CONFIG, CPU, batch_size=args.fit.batch_size), ("red/0.png",)),
    ):
        with pytest.raises(UnreadableImageError) as error:
            list(batches(loader))
        assert any(f"cannot use the image {damaged}" in str(error.value) and name in str(error.value) for name in names)
        assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_passed_over_and_counted_when_asked(make_args, damaged, workers):
    args = make_args(data_dir=str(damaged), workers=workers, batch_size=6, skip_bad_images=True)
    train, val = open_train_and_val(args)
    seen = list(batches(train_loader(args, train, CONFIG, CPU)))
    assert sum(len(targets) for _, targets in seen) == 18
    assert all((targets >= 0).all() for _, targets in seen)
    assert [name[len(str(damaged)) + 1 :] for name in train.bad_names()] == [
        "train/blue/0.png",
        "train/green/3.png",
        "train/red/5.png",
    ]
    targets = torch.cat(
        [targets for _, targets in batches(eval_loader(args.data, val, CONFIG, CPU, batch_size=args.fit.batch_size))]
    )
    assert targets.tolist() == [0, 0, 1, 1, IGNORED, 2]


def test_a_data_set_of_unreadable_images_ends(make_args, tmp_path):
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "0.png").write_bytes(b"")
    args = make_args(data_dir=str(tmp_path / "d"), val_split="", skip_bad_images=True, batch_size=2)
    with pytest.raises(UnreadableImageError, match="no image"):
        list(batches(train_loader(args, open_train_and_val(args)[0], CONFIG, CPU)))


def test_loading_processes_repeat_an_epoch_and_differ_between_epochs(make_args):
    args = make_args(workers=2)

    def epoch(loader, number):
        announce_epoch(loader, args.device.seed, number)
        return torch.cat([pixels for pixels, _ in batches(loader)])

    first = train_loader(args, open_train_and_val(args)[0], CONFIG, CPU)
    one, two = epoch(first, 1), epoch(first, 2)
    fresh = train_loader(args, open_train_and_val(args)[0], CONFIG, CPU)
    assert torch.equal(epoch(fresh, 2), two)
    assert not torch.equal(one, two)


def test_the_strongest_posterizing_works_with_every_pillow():
    image, own = Image.new("RGB", (4, 4), (255, 100, 3)), dict(NAME_TO_OP)
    with timm_patched():
        strongest, medium = (AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=m) for m in (10, 5))
        augment = rand_augment_transform("rand-m10-mstd0.5-inc1", {})
    assert strongest(image).getextrema() == ((0, 0),) * 3 and medium(image).getpixel((0, 0)) == (192, 64, 0)
    assert all(augment(image).size == (4, 4) for _ in range(300))
    assert own == NAME_TO_OP  # timm's table is its own again


def test_training_posterizes_so(make_args):
    args = make_args(aa="rand-m10-inc1")
    loader = train_loader(args, open_train_and_val(args)[0], CONFIG, CPU)
    randaugment = next(t for t in loader.dataset.transform.transforms if isinstance(t, RandAugment))
    assert posterize in {op.aug_fn for op in randaugment.ops}


def test_digits_are_split_by_class_for_good(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONZOO_CACHE", str(tmp_path))
    folder = digits.digits_folder()
    counts = {
        split: [len(list((folder / split / str(d)).iterdir())) for d in range(10)] for split in ("train", "validation")
    }
    assert sum(counts["train"]) == 1442 and sum(counts["validation"]) == 355
    assert min(counts["validation"]) == 34 and max(counts["validation"]) == 36
    assert Image.open(folder / "train/0/0000.png").size == (8, 8)
    assert (folder / "validation/0/0036.png").exists()  # the fifth zero: the split is part of published numbers
    (folder / "train/0/0000.png").unlink()
    with pytest.raises(ValueError, match=r"expected 1797 images .* found=1796; delete the folder"):
        digits.digits_folder()


def test_processes_that_write_the_digits_at_once_do_not_clash(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(digits, "COUNT", 1)
    together = threading.Barrier(2)

    def write(folder):
        (folder / "train/0").mkdir(parents=True)
        (folder / "train/0/0.png").write_bytes(b"x")
        together.wait(10)  # both have found no folder and written their own

    monkeypatch.setattr(digits, "_write_digits", write)
    found = []
    threads = [threading.Thread(target=lambda: found.append(digits.digits_folder())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "digits"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_nothing_is_left_when_writing_the_digits_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONZOO_CACHE", str(tmp_path))

    def fail(folder):
        (folder / "half").write_bytes(io.BytesIO(b"x").read())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digits, "_write_digits", fail)
    with pytest.raises(OSError, match="No space left"):
        digits.digits_folder()
    assert list(tmp_path.iterdir()) == []
