"""tools/sparse_rate.py: coding rates by their definition and the authors' code, a table and a plot, what is refused."""

import csv

import numpy as np
import pytest
import timm
import torch
from engine.helpers import run_tool, write_images
from golden import Record, relative_error
from PIL import Image

from visionzoo.engine.sparse_rate import coding_rate, sparse_rates

SIZE = {"depth": 3, "embed_dim": 16, "num_heads": 2, "img_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("place")
    write_images(path / "val", per_class=2, seed=0, size=32)
    for name, size in (("zoo_crate_t", SIZE), ("zoo_convit_t", {"depth": 2, "local_depth": 1, "embed_dim": 16})):
        args = {"model": name, "num_classes": 3, "model_kwargs": size}
        state = timm.create_model(name, num_classes=3, **size).state_dict()
        torch.save({"state_dict": state, "args": args}, path / f"{name}.pth")
    return path


def test_coding_rates_are_the_authors():
    record = Record("crate/coding_rate")
    rates = coding_rate(record.image()).sum(1)
    assert relative_error(rates.mean(), record.arrays["mean"]) <= 1e-9
    assert relative_error(rates.std(), record.arrays["std"]) <= 1e-9


@pytest.mark.parametrize("count", [5, 9])
def test_a_coding_rate_is_half_a_log_determinant(count):
    tokens = np.random.default_rng(0).normal(size=(count, 7))
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    eigenvalues = np.linalg.svd(unit, compute_uv=False) ** 2
    expected = 0.5 * np.log1p(7 / (count * 0.3) * eigenvalues).sum()
    assert coding_rate(torch.from_numpy(tokens), distortion=0.3).item() == pytest.approx(expected, rel=1e-12)
    assert coding_rate(torch.zeros(count, 7)).item() == 0


@torch.no_grad()
def test_layers_are_measured_where_attention_sees_the_tokens_and_after_the_codes():
    model = timm.create_model("zoo_crate_t", num_classes=3, mixers=(None, "full", None), **SIZE).double().eval()
    image = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    found = sparse_rates(model, image)
    assert list(found) == ["blocks.0", "blocks.2"]
    state = model.blocks[1](model.blocks[0](model.begin(image)))
    block = model.blocks[2]
    tokens = block.norm1(state.x)
    inside = sum(coding_rate(tokens @ head.T) for head in block.mixer.subspaces.weight.chunk(2))
    torch.testing.assert_close(found["blocks.2"]["subspace_rate"], inside)
    torch.testing.assert_close(found["blocks.2"]["rate_reduction"], coding_rate(tokens) - inside)
    codes = block(state).x
    assert torch.equal(found["blocks.2"]["nonzero"], (codes > 0).flatten(1).double().mean(1))
    assert (codes >= 0).all() and (found["blocks.2"]["nonzero"] < 0.9).all()


def test_one_command_writes_a_table_and_a_plot_and_replaces_none(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (taken := tmp_path / "output/sparse_rate/zoo_crate_t").mkdir(parents=True)
    command = (str(place / "val"), "--checkpoint", str(place / "zoo_crate_t.pth"), "--device", "cpu")
    assert run_tool("sparse_rate", *command) == 0
    said = capsys.readouterr().out
    assert "| layer | R | R^c | R - R^c | not zero |" in said and "over 6 images" in said
    folder = tmp_path / "output/sparse_rate/zoo_crate_t-1"
    with (folder / "sparse_rate.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["rate"]) > 0 and float(row["nonzero_std"]) >= 0 for row in rows)
    with Image.open(folder / "sparse_rate.png") as picture:
        assert picture.size[0] > picture.size[1] > 300
    assert not any(taken.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("val", "the following arguments are required: --checkpoint"),
        ("val --checkpoint zoo_convit_t.pth", "zoo_convit_t has no attention in subspaces; give --model zoo_crate_*"),
        ("val --checkpoint zoo_crate_t.pth --output val", "--output val exists already and is not replaced"),
        ("nowhere --checkpoint zoo_crate_t.pth", "no images at nowhere"),
    ],
)
def test_what_a_user_can_mend_is_one_message(place, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(place)
    assert run_tool("sparse_rate", *flags.split(), "--device", "cpu") == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (place / "output").exists()
