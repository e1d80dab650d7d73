"""--cache-images: what is decoded once is what would have been loaded, and the device crops as timm's transforms do."""

import tarfile

import numpy as np
import pytest
import torch
from engine.helpers import TINY_FLAGS, rows, run_tool, write_images, write_splits
from PIL import Image

from visionzoo.engine import cached
from visionzoo.engine.cached import CachedImages, DeviceLoader, crop_and_resize
from visionzoo.engine.data import eval_loader, open_train_and_val, train_loader
from visionzoo.engine.flags import train_parser
from visionzoo.engine.images import announce_epoch, seed_everything
from visionzoo.engine.options import changed
from visionzoo.engine.parallel import Process

CPU = Process(torch.device("cpu"))
CONFIG = {
    "input_size": (3, 40, 40),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.25),
}
DEVICE = ["--train-interpolation", "bilinear", "--color-jitter", "0"]


@pytest.fixture
def images(tmp_path):
    write_splits(tmp_path / "data")

    def opened(*flags, cache=True):
        place = ["--cache-images", str(tmp_path / "cache")] if cache else []
        args = train_parser().parse(["--data-dir", str(tmp_path / "data"), "-b", "4", "-j", "0", *place, *flags])
        args = changed(args, num_classes=3)
        return args, *open_train_and_val(args)

    return opened


def test_evaluation_sees_what_the_loader_would_have_loaded(images, monkeypatch):
    for flags, config in ((["-vb", "4"], CONFIG), ([], CONFIG | {"crop_pct": 0.5, "input_size": (3, 40, 40)})):
        loaders = []
        for cache in (True, False):
            args, _, val = images(*flags, cache=cache)
            loaders.append(eval_loader(args.data, val, config, CPU, batch_size=args.fit.batch_size))
        (got, targets), (expected, real) = (map(torch.cat, zip(*loader, strict=True)) for loader in loaders)
        assert isinstance(loaders[0], DeviceLoader) and len(loaders[0]) == len(loaders[1])
        assert torch.equal(targets, real)
        levels = (got - expected).abs() * 255 * torch.tensor(CONFIG["std"]).view(3, 1, 1)
        assert levels.max() < (0.01 if config is CONFIG else 1.01)  # PIL rounds after each of two passes
    monkeypatch.setattr(cached, "_decode", lambda *_: pytest.fail("decoded again"))
    _, train, val = images()
    assert isinstance(train, CachedImages) and len(train) == 12 and len(val) == 6
    assert val.class_to_idx == {"blue": 0, "green": 1, "red": 2}


def test_a_changed_file_is_decoded_anew(images, tmp_path):
    _, before, _ = images()
    Image.new("RGB", (40, 40), (7, 8, 9)).save(tmp_path / "data/train/blue/0.png")
    _, after, _ = images()
    assert before.pixels[0].tolist() != after.pixels[0].tolist() == np.full((40, 40, 3), (7, 8, 9)).tolist()


def test_an_archive_is_taken_like_its_folder(images, tmp_path):
    _, train, val = images()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(tmp_path / "data" / split, arcname=".")
    places = ["--data-dir", str(tmp_path / "train.tar"), "--val-data-dir", str(tmp_path / "val.tar")]
    for _ in range(2):
        _, *archived = images(*places)
        for folder, tar in zip((train, val), archived, strict=True):
            assert tar.class_to_idx == folder.class_to_idx and tar.targets.tolist() == folder.targets.tolist()
            assert sorted(map(bytes, tar.pixels)) == sorted(map(bytes, folder.pixels))


def test_crops_are_those_of_pil_but_for_rounding():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 12, 15, 3), dtype=np.uint8)
    boxes = [(0, 0, 12, 15), (2, 3, 7, 5), (11, 14, 1, 1)]  # top, left, height, width
    got = crop_and_resize(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).double(), *torch.tensor(boxes).double().unbind(1), (16, 20)
    )
    for image, ours, (top, left, height, width) in zip(pixels, got, boxes, strict=True):
        cut = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = torch.from_numpy(np.array(cut.resize((20, 16), Image.Resampling.BILINEAR))).permute(2, 0, 1)
        assert (ours - expected).abs().max() <= 1.01


def test_training_crops_mirrors_and_mixes_repeatably(images):
    args, train, _ = images(*DEVICE, "--mixup", "0.5", "--reprob", "0.5", "--scale", "0.3", "0.6")
    loader = train_loader(args, train, CONFIG, CPU)

    def epoch(number):
        announce_epoch(loader, 0, number)
        seed_everything(0, number)
        return list(loader)

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert len(first) == len(loader) == 3
    assert all(torch.equal(x, y) for one, two in zip(first, again, strict=True) for x, y in zip(one, two, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    batch, targets = first[0]
    assert batch.shape == (4, 3, 40, 40) and targets.shape == (4, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    loader.mixup_enabled = False  # then labels are those of single images, smoothed as before
    single, targets = epoch(0)[0]
    torch.testing.assert_close(targets.sort(1).values[:, :2], torch.full((4, 2), 0.1 / 3))
    assert not torch.equal(single, batch)

    args, train, _ = images(*DEVICE, "-b", "5")
    loader = train_loader(args, train, CONFIG, CPU)
    assert [len(targets) for _, targets in loader] == [5, 5] and len(loader) == 2

    plain = [*DEVICE, "--scale", "1", "1", "--ratio", "1", "1", "--hflip", "1"]
    args, train, _ = images(*plain)
    loader = train_loader(args, train, CONFIG, CPU)
    batch, targets = next(iter(loader))
    mean, std = (torch.tensor(CONFIG[name]).view(3, 1, 1) for name in ("mean", "std"))
    seen = {tuple(image.mul(std).add(mean).mul(255).round().flatten().tolist()) for image in batch}
    mirrored = {tuple(image[:, ::-1].transpose(2, 0, 1).flatten().tolist()) for image in np.array(train.pixels)}
    assert len(seen) == 4 and seen <= mirrored


def test_a_policy_augments_between_the_crop_and_erasing(images):
    """Of the loaded images, cropped to themselves, each is as timm's operations of one policy made it, or as it was."""
    plain = ["--scale", "1", "1", "--ratio", "1", "1", "--hflip", "0", "--train-interpolation", "bilinear"]
    args, train, _ = images(*plain, "--aa", "v0", "--color-jitter", "0.4", "-b", "12")  # the jitter is timm's default
    loader = train_loader(args, train, CONFIG, CPU)
    loader.auto_augment.draw = lambda count: np.full((count, 1), number)
    number = next(n for n, operation in enumerate(loader.auto_augment.operations) if operation.name == "Invert")
    ((batch, _),) = loader
    mean, std = (torch.tensor(CONFIG[name]).view(3, 1, 1) for name in ("mean", "std"))
    seen = {image.tobytes() for image in batch.mul(std).add(mean).mul(255).round().byte().permute(0, 2, 3, 1).numpy()}
    assert seen == {(255 - image).tobytes() for image in np.array(train.pixels)} and len(seen) == 12
    args, train, _ = images(*plain, "--aa", "v0", "--no-aug")
    assert train_loader(args, train, CONFIG, CPU).auto_augment is None


def test_padded_crops_are_torchvisions_of_what_evaluation_sees(images):
    """Loaded or cached, at the offsets that were drawn; every offset is drawn, and no other."""
    config = CONFIG | {"input_size": (3, 8, 8), "crop_pct": 1.0}
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    for cache in (True, False):
        args, train, _ = images(*DEVICE, "--crop-padding", "2", "--hflip", "0", cache=cache)
        if cache:
            train.pixels, train.targets = pixels, np.arange(4)
        loader = train_loader(args, train, config, CPU)
        seed_everything(0, 1)
        found = [set() for _ in range(4)]
        padded = [np.pad(image, [(2, 2), (2, 2), (0, 0)], mode="reflect") for image in pixels]
        places = {
            image[y : y + 8, x : x + 8].tobytes(): (i, y, x)
            for i, image in enumerate(padded)
            for y in range(5)
            for x in range(5)
        }
        assert len(places) == 100
        for _ in range(60):
            if cache:
                ((batch, targets),) = loader
                seen = batch.mul(std).add(mean).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
                assert targets.tolist() == [places[image.tobytes()][0] for image in seen]
            else:
                seen = [np.asarray(train.transform(Image.fromarray(image))).transpose(1, 2, 0) for image in pixels]
            for image in seen:
                number, *place = places[np.ascontiguousarray(image).tobytes()]
                found[number].add(tuple(place))
        assert all(len(offsets) > 20 for offsets in found)
        assert set.union(*found) == {(y, x) for y in range(5) for x in range(5)}


def test_a_run_trains_on_them_and_resumes(tmp_path):
    write_splits(tmp_path / "data")
    flags = ["--model", "zoo_poolformer_s12", "--model-kwargs", "depths=[1]", "embed_dims=[8]", *TINY_FLAGS, *DEVICE]
    flags += ["--data-dir", str(tmp_path / "data"), "--cache-images", str(tmp_path / "cache"), "--img-size", "64"]
    flags += ["--mixup", "0.5", "--mixup-off-epoch", "1", "--aa", "rand-m9-mstd0.5-inc1"]
    for name, more in (("straight", []), ("stopped", ["--max-steps", "4"]), ("stopped", ["--resume", "auto"])):
        place = ["--output", str(tmp_path / "out"), "--experiment", name, "--epochs", "2", "--no-curves"]
        assert run_tool("train", *flags, *place, *more) == 0
    straight, stopped = (rows(tmp_path / "out" / name)[-1] for name in ("straight", "stopped"))
    assert [straight[name] for name in ("train_loss", "eval_loss")] == [
        stopped[name] for name in ("train_loss", "eval_loss")
    ]
    assert not (tmp_path / "out/straight/curves.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--img-size", "32"], "images of 40 x 40 pixels are larger than the input of 32 x 32"),
        (
            ["--aa", "augmix-m5"],
            "--cache-images does not go with --aa augmix-m5 (expected rand-..., original, v0 or 3a)",
        ),
        (["--aa", "3a", "--color-jitter", "0.4"], "does not go with --color-jitter 0.4 (expected 0.0)"),
        (["--color-jitter", "0.4"], "does not go with --color-jitter 0.4 (expected 0.0)"),
        (["--train-interpolation", "random"], "does not go with --train-interpolation random (expected 'bilinear')"),
        (["--dataset", "torch/cifar10"], "--cache-images is for images in folders and .tar files"),
        (["--num-classes", "2"], "num_classes is 2, the data set has 3 classes"),
        (["--crop-padding", "40"], "--crop-padding: expected fewer pixels than the input's 40, got 40"),
        (["--crop-padding", "4", "--no-aug"], "--crop-padding does not go with --no-aug"),
    ],
)
def test_what_cannot_be_cached_is_said(tmp_path, capsys, flags, message):
    write_splits(tmp_path / "data")
    model = ["--model", "zoo_poolformer_s12", "--model-kwargs", "depths=[1]", "embed_dims=[8]", *TINY_FLAGS, *DEVICE]
    place = ["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    cache = ["--cache-images", str(tmp_path / "cache"), "--img-size", "40"]
    assert run_tool("train", *model, *place, *cache, *flags) == 1
    assert message in capsys.readouterr().err


def test_images_of_several_sizes_and_bad_ones_are_refused(images, tmp_path):
    write_images(tmp_path / "data/train/more", per_class=1, seed=2, size=30)
    with pytest.raises(ValueError, match=r"needs images of one size, got 30 x 30 pixels .* after 40 x 40"):
        images()
    for path in (tmp_path / "data/train/more").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot use the image"):
        images()
    with pytest.raises(ValueError, match="3 images cannot be used"):
        images("--skip-bad-images")
