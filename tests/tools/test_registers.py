"""tools/registers.py: norms before and after as pictures, neurons as a file, and what is refused."""

import json

import pytest
import timm
import torch
from engine.helpers import run_tool, write_images

from visionzoo.engine import registers

SIZE = {"depth": 2, "embed_dim": 16, "num_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("place")
    write_images(path / "d", per_class=2, seed=0, size=64)
    for name, model, size in (("cpvt", "zoo_cpvt_t", SIZE), ("pyramid", "zoo_poolformer_s12", {"depths": [1] * 4})):
        torch.manual_seed(0)
        built = timm.create_model(model, num_classes=3, **size)
        args = {"model": model, "num_classes": 3, "img_size": 64, "model_kwargs": size}
        torch.save({"state_dict": built.state_dict(), "args": args}, path / f"{name}.pth")
    return path


@pytest.mark.parametrize("threshold", ["0.001", "1000"])
def test_norms_are_drawn_and_absence_is_said(place, tmp_path, monkeypatch, capsys, threshold):
    monkeypatch.chdir(tmp_path)
    drawn = []
    draw = registers.draw_maps
    monkeypatch.setattr(
        registers, "draw_maps", lambda image, rows, path, over: drawn.append(rows) or draw(image, rows, path, over=over)
    )
    flags = ["--checkpoint", str(place / "cpvt.pth"), "--device", "cpu", "--num-pictures", "2", "--top-k", "3"]
    assert run_tool("registers", str(place / "d"), *flags, "--num-images", "4", "--threshold", threshold) == 0
    said = capsys.readouterr().out
    files = {path.name for path in (tmp_path / "output/registers").iterdir()}
    titles = [[title.split(":")[0] for title, _ in rows[0]] for rows in drawn]
    assert all(values.shape == (4, 4) for rows in drawn for _, values in rows[0])
    if threshold == "1000":
        assert "ConditionalTransformer has no outliers on 4 images: after block 1" in said
        assert files == {"norms-0.png", "norms-1.png"} and titles == [["before"]] * 2
        return
    assert "64 outliers above a norm of 0.001 on 4 images" in said and "moved to 1 register:" in said
    assert files == {"norms-0.png", "norms-1.png", "registers.json"} and titles == [["before", "after"]] * 2
    assert any((rows[0][0][1] != rows[0][1][1]).any() for rows in drawn)
    found = json.loads((tmp_path / "output/registers/registers.json").read_text())
    assert sum(map(len, found["neurons"].values())) == len(found["scores"]) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--checkpoint pyramid.pth", "for isotropic models, whose tokens all meet; PoolFormer is a pyramid"),
        ("--checkpoint cpvt.pth --block 2", "has 2 blocks: expected from -2 to 1, got 2"),
        ("--checkpoint cpvt.pth --top-k 0", "--top-k: expected a number at least 1"),
        ("--model zoo_cpvt_t", "zoo_cpvt_t has no weights: give --checkpoint or --pretrained"),
    ],
)
def test_what_a_user_can_mend_is_one_message(place, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(place / "d")
    for name in ("cpvt", "pyramid"):
        flags = flags.replace(f"{name}.pth", str(place / f"{name}.pth"))
    assert run_tool("registers", "red/0.png", *flags.split(), "--device", "cpu") == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (place / "d/output").exists()
