"""Which images a command line stands for, and what is said of the rest; names that are not text; files of names."""

import json
import os

import pytest
from engine.helpers import run_tool, write_images
from PIL import Image

from visionzoo.engine import charts
from visionzoo.engine.data import class_names, open_split
from visionzoo.engine.errors import UserError
from visionzoo.engine.flags import DataConfig
from visionzoo.engine.image_files import PICTURES, find_images
from visionzoo.engine.images import read_image
from visionzoo.engine.names import read_class_map, read_names


def write(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (9, 9)).save(path)


def found(*sources):
    notes = []
    return list(map(str, find_images(sources, notes))), notes


def test_pictures_of_every_usual_kind_are_taken_and_others_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ending in (*PICTURES, ".gif", ".ico", ".PNG"):
        write(tmp_path / f"d/x{ending}")
    (tmp_path / "d/notes.txt").write_text("no image")
    images, notes = found("d")
    assert images == sorted(f"d/x{ending}" for ending in (*PICTURES, ".PNG"))
    assert notes == ["d: skipped 1 .gif, 1 .ico"]
    assert found("d/x.gif") == (["d/x.gif"], [])  # asked for by name
    with pytest.raises(UserError, match=r"no images at d/\*\.gif but 1 \.gif; known endings are \.bmp"):
        found("d/*.gif")


def test_an_image_is_met_once_by_whatever_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/a/1.png", "d/b/2.png", "elsewhere/3.png"):
        write(tmp_path / name)
    for link, target in {"d/a/up": "..", "d/b/top": "../..", "d/same": "a", "elsewhere/round": "."}.items():
        (tmp_path / link).symlink_to(target)
    for link in ("d/out", "d/out2"):
        (tmp_path / link).symlink_to("../elsewhere")
    images, notes = found("d")
    assert [os.path.basename(image) for image in images] == ["1.png", "2.png", "3.png"]
    assert all(f"the link d/{link}" in notes[0] for link in ("a/up", "b/top", "same"))
    assert found("d/**/*.png")[0] == ["d/a/1.png", "d/b/2.png"]
    write(tmp_path / "d/.hidden/4.png")
    assert len(found("d/**/*.png")[0]) == 2 and len(found("d/.hidden/*.png")[0]) == 1


def test_a_folder_that_cannot_be_read_stops_by_name(tmp_path, monkeypatch):
    write(tmp_path / "d/a/1.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot look into the folder .*/a: Permission denied"):
        found(str(tmp_path / "d"))


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """A folder of an image before and behind one whose name is not UTF-8, and one that clears the screen."""
    monkeypatch.chdir(tmp_path)
    for name in (b"a.png", b"caf\xe9.png", b"\x1b[2Jred.png", b"z.png"):
        write_to = os.path.join(os.fsencode(tmp_path), b"d", name)
        os.makedirs(os.path.dirname(write_to), exist_ok=True)
        Image.new("RGB", (40, 40), (200, 30, 30)).save(os.fsdecode(write_to), format="PNG")
    return tmp_path


def test_images_of_any_name_are_predicted_and_steer_no_terminal(strange, trained, capsys):
    flags = ["--checkpoint", str(trained[0] / "last.pth.tar"), "--device", "cpu", "--output", "o"]
    assert run_tool("predict", "d", *flags) == 0
    said = capsys.readouterr().out
    assert "d/caf\\udce9.png: red" in said and "\\x1b[2Jred.png" in said and "\x1b" not in said
    lines = [json.loads(line) for line in (strange / "o/predictions.jsonl").read_text().splitlines()]
    assert {os.fsencode(line["image"]) for line in lines} == {b"d/" + name for name in os.listdir(b"d")}
    assert all(os.path.exists(line["picture"]) for line in lines)
    assert run_tool("predict", "d", *flags) == 0  # its own lines are read again
    os.truncate(b"d/caf\xe9.png", 60)
    assert run_tool("predict", "d", *flags) == 1
    assert "cannot use the image d/caf\\udce9.png" in capsys.readouterr().err


def test_names_beyond_a_font_are_drawn_by_another_or_said(monkeypatch, tmp_path):
    image = Image.new("RGB", (50, 50))
    # matplotlib's own DejaVu Sans lacks this letter, its STIX has it
    letter = "\u1d84"
    families, missing = charts.fonts_for(f"a{letter}")
    assert missing == set() and len(families) > 1

    def drawn(*names):
        classes = [{"index": i, "name": name, "probability": 0.5} for i, name in enumerate(names)]
        lost = charts.draw_prediction(image, classes, tmp_path / "x.png")
        return lost, Image.open(tmp_path / "x.png").tobytes()

    lost, with_letter = drawn(letter, "b")
    assert lost == set() and with_letter != drawn("class 0", "b")[1]
    monkeypatch.setattr(charts, "_characters", lambda path: frozenset(range(128)))  # no font of the machine has more
    lost, without = drawn("猫", "b")
    assert lost == {"猫"} and without == drawn("class 0", "b")[1]
    assert "no installed font has 猫: the pictures show `class NUMBER`" in charts.missing_fonts(lost)


@pytest.mark.parametrize("name", ["$5_$10", r"$\frac{1}$", "a_b^c", "\x1b[31mred", "two\nlines", "caf\udce9", ""])
def test_names_are_no_markup(tmp_path, name):
    classes = [{"index": 0, "name": name, "probability": 0.5}]
    assert charts.draw_prediction(Image.new("RGB", (50, 50)), classes, tmp_path / "x.png") == set()
    assert charts.is_picture(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["RGB", "L", "HSV", "RGBA", "CMYK", "LAB", "YCbCr", "LA"])
def test_what_is_drawn_is_small_whatever_the_image_is(mode, monkeypatch):
    small = charts._small(Image.new(mode, (5000, 20)))
    assert small.size == (1000, 4) and small.mode == ("L" if mode == "L" else "RGB")
    assert charts._small(Image.new(mode, (30, 20))).size == (30, 20)


def test_a_large_image_is_held_once(monkeypatch, tmp_path):
    Image.new("RGB", (2000, 1500)).save(tmp_path / "x.png")
    copies = []
    monkeypatch.setattr(Image.Image, "copy", lambda self: copies.append(self.size))
    image = read_image(tmp_path / "x.png", "RGB", upright=False)
    assert image.size == (2000, 1500) and image.getpixel((1999, 1499)) == (0, 0, 0) and copies == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"cat\ndog", ["cat", "dog"]),
        (b"cat\r\ndog\r\n\r\n \n", ["cat", "dog"]),
        (b"\xef\xbb\xbfcat\r\ndog\r\n", ["cat", "dog"]),
        ("猫\n犬\n".encode(), ["猫", "犬"]),
    ],
)
def test_names_are_the_lines_of_a_file(tmp_path, text, names):
    (tmp_path / "m.txt").write_bytes(text)
    assert read_class_map("m.txt", str(tmp_path)) == {name: number for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"cat\n\ndog\n", "its line 2 is empty"),
        (b"\ncat\n", "its line 1 is empty"),
        (b"", "it is empty"),
        (b" \n\n", "it is empty"),
        (b"cat\ndog\ncat \n", "names cat twice"),
        ("cat\n".encode("utf-16"), "cannot read the class map"),
    ],
)
def test_class_maps_with_phantom_classes_are_refused(tmp_path, text, message):
    (tmp_path / "m.txt").write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_class_map(str(tmp_path / "m.txt"), None)


def test_names_of_classes_may_be_alike(tmp_path):
    (tmp_path / "n.txt").write_text("crane\ncrane\n")  # ImageNet's bird and ImageNet's machine
    assert read_names(tmp_path / "n.txt", "class names") == ["crane", "crane"]


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_class_map_of_an_editor_numbers_the_data_sets_classes(tmp_path, multi_label):
    write_images(tmp_path / "d/train", per_class=1, seed=0)
    table = "".join(f"{c}/0.png,{c}\n" for c in ("red", "blue", "green"))
    (tmp_path / "d/train/labels.csv").write_text(f"image,labels\n{table}")
    (tmp_path / "m.txt").write_bytes(b"\xef\xbb\xbfred\r\nblue\r\ngreen\r\n\r\n")
    given = DataConfig(data_dir=str(tmp_path / "d"), multi_label=multi_label)
    data = open_split(
        given,
        is_training=True,
        split="train",
        root=str(tmp_path / "d/train") if multi_label else given.data_dir,
        channels=3,
        seed=0,
        batch_size=4,
        class_map=str(tmp_path / "m.txt"),
    )
    assert class_names(data) == ["red", "blue", "green"]
