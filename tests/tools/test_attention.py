"""tools/attention.py: what class queries and probes see, as pictures, and what is refused."""

import pytest
import timm
import torch
from engine.helpers import COLOURS, run_tool, write_images
from PIL import Image

import visionzoo
from visionzoo.engine import attention

SIZE = {"depths": [1, 1], "embed_dims": [8, 16], "topks": [1, -2], "regions": 2}
INTR = {"type": "intr", "hidden_dim": 8, "num_heads": 2, "enc_layers": 1, "dec_layers": 2, "mlp_dim": 16}
HEADS = {"intr": INTR, "ep": {"type": "ep", "num_queries": 2}, "own": None}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("place")
    write_images(path / "d", per_class=1, seed=0)
    (path / "d/red/bad.png").write_bytes(b"no image")
    for name, head in HEADS.items():
        torch.manual_seed(0)
        model = timm.create_model("zoo_biformer_t", num_classes=3, head=head, **SIZE)
        args = {"model": "zoo_biformer_t", "num_classes": 3, "img_size": 64}
        args["model_kwargs"] = SIZE | ({"head": head} if head else {})
        state = {"state_dict": model.state_dict(), "args": args, "class_names": sorted(COLOURS)}
        torch.save(state, path / f"{name}.pth")
    return path


def test_a_seed_repeats_what_is_random(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []
    for before in range(2):
        torch.manual_seed(before)
        flags = ["--checkpoint", str(place / "ep.pth"), "--device", "cpu", "--seed", "7"]
        assert run_tool("attention", str(place / "d/red/0.png"), *flags) == 0
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("head", "rows"), [("intr", 2), ("ep", 1)])
def test_each_image_gets_its_picture(place, tmp_path, monkeypatch, capsys, head, rows):
    monkeypatch.chdir(tmp_path)
    drawn = []
    draw = attention.draw_maps
    monkeypatch.setattr(attention, "draw_maps", lambda image, rows, path: drawn.append(rows) or draw(image, rows, path))
    flags = ["--checkpoint", str(place / f"{head}.pth"), "--device", "cpu", "--skip-bad-images"]
    assert run_tool("attention", str(place / "d"), *flags) == 0
    said = capsys.readouterr().out
    assert said.count("predicted") == 3 and "true class red" in said and "1 unreadable image was skipped" in said
    pictures = sorted((tmp_path / "output/attention").iterdir())
    assert [path.name for path in pictures] == ["0-1.png", "0-2.png", "0.png"]
    assert Image.open(pictures[0]).size[1] > 200
    assert max(map(len, drawn)) == rows and {len(row) for each in drawn for row in each} == {3}  # mean, two of it
    model = timm.create_model("zoo_biformer_t", num_classes=3, head=HEADS[head], **SIZE).eval()
    visionzoo.load_weights(model, place / f"{head}.pth")
    seen = visionzoo.head_attention(model, torch.randn(2, 3, 64, 64))[0]
    assert seen.shape == ((2, 2, 3, 8, 8) if head == "intr" else (2, 1, 2, 8, 8))
    torch.testing.assert_close(seen.sum((3, 4)), torch.ones_like(seen[..., 0, 0]))


def test_of_a_wrong_prediction_both_classes_are_shown(place, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(attention, "draw_maps", lambda image, rows, path: drawn.append(rows) or set())
    flags = ["--checkpoint", str(place / "intr.pth"), "--device", "cpu", "--output", str(tmp_path)]
    for label in range(3):
        assert run_tool("attention", str(place / "d/red/0.png"), *flags, "--label", str(label)) == 0
    titles = [[row[0][0] for row in rows] for rows in drawn]
    assert sorted(map(len, titles)) == [1, 2, 2]
    assert all(t[-1].endswith("(true)") and t[0].endswith("(predicted)") for t in titles if len(t) == 2)
    assert next(t[0] for t in titles if len(t) == 1).endswith("(predicted, true)")
    two = next(rows for rows in drawn if len(rows) == 2)
    assert (two[0][1][1] != two[1][1][1]).any()  # each class has a map of its own


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("red/0.png", "the following arguments are required: --checkpoint"),
        ("red/0.png --checkpoint own.pth", "BiFormer has a ClassifierHead as its head, which has no queries: build it"),
        ("red/0.png --checkpoint intr.pth --layer 2", "layer must be from -2 to 1, got layer=2"),
        (
            "red/0.png --checkpoint intr.pth --label rot",
            "expected a class name or a number below 3, got 'rot'",
        ),
        ("red/bad.png --checkpoint intr.pth", "cannot use the image red/bad.png"),
        ("nowhere --checkpoint intr.pth", "no images at nowhere"),
    ],
)
def test_what_a_user_can_mend_is_one_message(place, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(place / "d")
    for name in HEADS:
        flags = flags.replace(f"{name}.pth", str(place / f"{name}.pth"))
    assert run_tool("attention", *flags.split(), "--device", "cpu") == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (place / "d/output").exists()
