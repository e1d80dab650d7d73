"""Folders as people have them: what is read, what is skipped and counted, what is refused by name."""

import multiprocessing
import os
import signal
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from engine.helpers import run_tool, truncate, write_images
from PIL import Image
from timm.data import IterableImageDataset

from visionzoo.engine.data import check_labels, open_train_and_val, train_loader
from visionzoo.engine.errors import UnreadableImageError, UserError
from visionzoo.engine.evaluation import evaluate_checkpoint
from visionzoo.engine.images import CheckedImages, batches, to_mode
from visionzoo.engine.parallel import Process
from visionzoo.engine.trained_flags import eval_parser
from visionzoo.engine.training import train

CONFIG = {"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
CONFIG |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
LEFT = np.zeros((40, 60, 3), dtype=np.uint8)
LEFT[:, :30] = 200  # brighter on the left


def write(path, pixels=LEFT, mode=None, **options):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)


def photo(path, orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(path, exif=exif)


def animation(path):
    frames = [Image.fromarray(LEFT), Image.new("RGB", (60, 40), "blue")]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def deep(path):
    write(path, (LEFT[..., 0].astype(np.uint16) << 8) + 77)


READ = {
    "cmyk.jpg": lambda path: write(path, mode="CMYK"),
    "grey.png": lambda path: write(path, mode="L"),
    "bits.png": lambda path: write(path, mode="1"),  # dithered
    "palette.png": lambda path: write(path, mode="P"),
    "alpha.png": lambda path: write(path, mode="RGBA"),
    "16 bits.png": deep,
    "animation.gif": animation,
    "a GIF.png": animation,
    "a PNG.jpg": lambda path: write(path, format="PNG"),
    "photo.jpg": photo,
    "16 bits.tif": deep,
}


@pytest.mark.parametrize("name", READ)
def test_unusual_images_are_read_as_they_look(tmp_path, name):
    path = tmp_path / name
    READ[name](path)
    with Image.open(path) as image:
        pixels = np.asarray(to_mode(image, "RGB")).astype(int)
    assert pixels.shape == (40, 60, 3)
    bright, dark = pixels[:, :25].mean(), pixels[:, 35:].mean()
    assert bright == pytest.approx(200, abs=4) and dark < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_when_asked(tmp_path, orientation):
    """The picture as it is to be seen is bright in one corner; orientations say where that corner is stored."""
    seen = np.zeros((48, 96), dtype=np.uint8)
    seen[:16, :32] = 200
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.T,
        6: np.rot90(seen),
        7: seen[::-1, ::-1].T,
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(to_mode(image, "L")), stored)
        assert np.array_equal(np.asarray(to_mode(image, "L", upright=True)), seen)


def test_a_run_with_orientation_evaluates_with_it(make_args, images, tmp_path, monkeypatch):
    seen = []
    original = to_mode

    def noted(image, mode, *, upright=False):
        seen.append(upright)
        return original(image, mode, upright=upright)

    monkeypatch.setattr("visionzoo.engine.images.to_mode", noted)
    train(make_args(apply_exif_orientation=True, max_steps=1))
    flags = ["--checkpoint", str(tmp_path / "output/run/last.pth.tar"), "--recorded-data", "--device", "cpu", "-j", "0"]
    evaluate_checkpoint(eval_parser().parse(flags))
    assert all(seen) and len(seen) > 9 + 9
    seen.clear()
    train(make_args(max_steps=1, experiment="stored"))
    assert not any(seen) and seen


def test_pixels_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)).save(tmp_path / "a.tif")
    with (
        Image.open(tmp_path / "a.tif") as image,
        pytest.raises(ValueError, match=r"32 bits \(F\) have no agreed range"),
    ):
        to_mode(image, "RGB")


def cut_jpeg(path):
    write(path, np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    truncate(path)


UNUSABLE = {
    "cut.jpg": (cut_jpeg, "truncated"),
    "empty.png": (lambda path: path.write_bytes(b""), "cannot identify image file"),
    "text.jpg": (lambda path: path.write_text("no image"), "cannot identify image file"),
    "page.png": (lambda path: path.write_text("<html>404</html>"), "cannot identify image file"),
    "link.png": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "bomb.png": (lambda path: path.write_bytes(bomb()), "exceeds limit"),
    "float.png": (lambda path: Image.new("F", (9, 9)).save(path, "TIFF"), "no agreed range"),
    os.fsdecode(b"\xff.png"): (lambda path: path.write_bytes(b""), "cannot identify image file"),
}


def bomb():
    """The header of a PNG of 50,000 x 50,000 pixels."""
    data = BytesIO()
    Image.new("L", (1, 1)).save(data, "PNG")
    content = bytearray(data.getvalue())
    content[16:24] = (50_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "d/train", per_class=4, seed=0)
    write_images(tmp_path / "d/val", per_class=2, seed=1)
    return tmp_path / "d"


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_images_are_refused_by_name_or_passed_over_and_counted(make_args, folder, capsys, name):
    make, words = UNUSABLE[name]
    shown = name.encode(errors="backslashreplace").decode()
    make(folder / "train/red" / name)
    options = {"data_dir": str(folder), "batch_size": 13, "epochs": 1}
    with pytest.raises(UserError) as error:
        train(make_args(**options))
    assert f"cannot use the image {folder}/train/red/{shown}: " in str(error.value) and words in str(error.value)
    assert "--skip-bad-images" in str(error.value)
    capsys.readouterr()
    train(make_args(**options, skip_bad_images=True, experiment="skips"))
    assert f"1 unusable training image was skipped\n  {folder}/train/red/{shown}" in capsys.readouterr().out


def test_every_ending_is_read_or_told(make_args, folder, capsys):
    write(folder / "train/red/a.webp")
    write(folder / "train/blue/b.BMP")
    (folder / "train/blue/notes.txt").touch()
    train(make_args(data_dir=str(folder), epochs=1))
    said = capsys.readouterr().out
    assert "pictures of other endings are left out (1 .bmp, 1 .webp); --input-key '.bmp;.jpeg;.jpg;.png;.webp'" in said
    assert "12 images to train on" in said
    train(make_args(data_dir=str(folder), epochs=1, experiment="b", input_key=".bmp;.jpeg;.jpg;.png;.webp"))
    assert "14 images to train on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "words", "passed_over"),
    [
        (
            lambda train: (train / "grey").mkdir(),
            r"no image \(\.jpeg \.jpg \.png\) of 1 class in .*/train: grey; add some, remove the folders, or",
            "of 1 class in {train}: grey: skipped",
        ),
        (
            lambda train: ((train / "grey").mkdir(), write(train / "grey/a.webp")),
            r"of 1 class in .*: grey; .*left out \(1 \.webp\); --input-key",
            "of 1 class in {train}: grey: skipped",
        ),
        (
            lambda train: write(train / "overview.png"),
            r"beside the folders of the classes: 1 in .*/train; they would make a class of their own",
            "beside the folders of the classes: 1 in {train}: skipped",
        ),
        (
            lambda train: ((train / ".ipynb_checkpoints").mkdir(), write(train / ".ipynb_checkpoints/a.png")),
            r"beside the folders of the classes: 1 in .*/train/\.ipynb_checkpoints",
            "beside the folders of the classes: 1 in {train}/.ipynb_checkpoints: skipped",
        ),
    ],
    ids=["empty class", "class of other endings", "beside", "hidden"],
)
def test_folders_that_are_no_classes_are_refused_or_told(make_args, folder, capsys, make, words, passed_over):
    make(folder / "train")
    with pytest.raises(UserError, match=words):
        train(make_args(data_dir=str(folder)))
    train(make_args(data_dir=str(folder), skip_bad_images=True, epochs=1, batch_size=4))
    said = capsys.readouterr().out
    assert passed_over.format(train=folder / "train") in said and "12 images to train on, 6 to validate on" in said


class Numbered(torch.utils.data.Dataset):
    """Images whose classes are the given numbers."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.new("RGB", (40, 40)), self.labels[index]

    def __iter__(self):
        return iter([self[index] for index in range(len(self))])


@pytest.mark.parametrize(("label", "workers"), [(3, 1), (3, 0), (-1, 0), (None, 0)])
def test_classes_out_of_range_are_refused_or_passed_over(make_args, workers, label):
    args = make_args(workers=workers, batch_size=4, num_classes=3)
    for skip in (False, True):
        images = CheckedImages(Numbered([0, 1, 2, label]), mode="RGB", is_training=True, skip_bad=skip, seed=0)
        check_labels(images, 3)
        loader = train_loader(args, images, CONFIG, Process(torch.device("cpu")))
        if skip:
            assert sorted(targets.tolist() for _, targets in batches(loader))[0].count(0) == 2  # the next one's place
            assert images.bad_names() == ["number 3"]
            continue
        with pytest.raises(UnreadableImageError) as error:
            list(batches(loader))
        number = -1 if label is None else label
        assert f"the image number 3: its class is number {number}, the model has 3, from 0 to 2" in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_classes_of_a_stream_out_of_range_stop_in_plain_words(make_args, monkeypatch, workers):
    stream = IterableImageDataset(None, reader=Numbered([0, 1, 7, 2] * 3))
    monkeypatch.setattr("visionzoo.engine.data.create_dataset", lambda name, **_: stream)
    with pytest.raises(UserError) as error:
        train(make_args(dataset="wds/x", num_classes=3, val_split="", workers=workers))
    assert str(error.value) == (
        "an image of the stream cannot be used: its class is number 7, the model has 3, from 0 to 2; fix the data set"
    )


def train_with_dying_workers(args, said):
    """Let a loading process be killed over an image in the second epoch, as the system does when memory runs out."""
    read, first = CheckedImages.__getitem__, os.getpid()
    multiprocessing.set_start_method("fork", force=True)  # so that loading processes have the patch

    def dying(self, index):
        if os.getpid() != first and int(self.epoch) == 1 and index % 7 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    CheckedImages.__getitem__ = dying
    torch.set_num_threads(1)
    try:
        train(args)
    except UserError as error:
        said.put(str(error))


def test_a_loading_process_that_dies_ends_the_run_with_words(make_args, tmp_path):
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["visionzoo.engine.training"])
    said = fork.SimpleQueue()
    child = fork.Process(target=train_with_dying_workers, args=(make_args(workers=2), said))
    child.start()
    child.join(120)
    if child.is_alive():
        child.kill()
        pytest.fail("it hangs")
    assert not said.empty(), "it ended in no UserError"
    message = said.get()
    last = tmp_path / "output/run/last.pth.tar"
    assert "a process that loads images has died: DataLoader worker (pid" in message and "--workers" in message
    assert f"The last good checkpoint: {last}; continue with: " in message
    assert message in (tmp_path / "output/run/log.txt").read_text()


def test_all_of_it_at_once_is_passed_over_and_the_rest_is_learned(make_args, folder, capsys):
    """Through the command, with loading processes."""
    for name, (make, _) in UNUSABLE.items():
        make(folder / "train/red" / name)
        make(folder / "val/green" / name)
    for name, make in READ.items():
        make(folder / "train/blue" / name)
    flags = ["--data-dir", str(folder), "--output", str(folder.parent / "o"), "--experiment", "run", "--epochs", "1"]
    flags += ["--model", "test_convnext", "--img-size", "32", "-b", "4", "--device", "cpu", "-j", "2"]
    assert run_tool("train", *flags, "--warmup-epochs", "0") == 1
    assert "error: cannot use the image" in capsys.readouterr().err
    assert run_tool("train", *flags, "--warmup-epochs", "0", "--skip-bad-images", "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert f"{len(UNUSABLE)} unusable training images were skipped" in said
    assert f"{len(UNUSABLE)} unusable validation images were skipped" in said


def test_images_of_any_shape_are_taken(make_args, folder):
    for name, size in (("dot", (1, 1)), ("line", (1, 700)), ("bar", (900, 2))):
        Image.new("RGB", size).save(folder / f"train/red/{name}.png")
        Image.new("RGB", size).save(folder / f"val/red/{name}.png")
    assert train(make_args(data_dir=str(folder), batch_size=5, epochs=1))["updates"] == 3
    assert len(open_train_and_val(make_args(data_dir=str(folder)))[1]) == 9
