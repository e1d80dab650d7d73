"""tools/fit_hashes.py: a checkpoint of the softmax form becomes one with hash functions, and what is refused."""

import pytest
import timm
import torch
from engine.helpers import run_tool, write_images

SIZE = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 24], "num_heads": [1, 2, 2, 4]}
FLAGS = ["--device", "cpu", "--steps", "2", "--neighbors", "3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("place")
    write_images(path / "d/val", per_class=2, seed=0, size=64)
    (path / "d/val/red/bad.png").write_bytes(b"no image")
    model = timm.create_model("zoo_ecoformer_pvtv2_b0_msa", num_classes=3, **SIZE)
    args = {"model": "zoo_ecoformer_pvtv2_b0_msa", "num_classes": 3, "model_kwargs": SIZE, "img_size": 64}
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    names = ["blue", "green", "red"]
    torch.save({"state_dict": state, "args": args, "class_names": names}, path / "softmax.pth")
    torch.save({"state_dict": state}, path / "weights.pth")
    torch.save({"state_dict": {n: v for n, v in state.items() if "fc1" not in n}, "args": args}, path / "lacking.pth")
    return path


def test_the_fitted_checkpoint_is_evaluated_and_loaded_and_never_replaced(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "zoo_ecoformer_pvtv2_b0", "--checkpoint", str(place / "softmax.pth"), "--skip-bad-images"]
    for _ in range(2):
        assert run_tool("fit_hashes", str(place / "d/val"), *flags, *FLAGS) == 0
    said = capsys.readouterr().out
    assert said.count("7 images are there, of --num-images 32") == 2
    assert said.count("1 unreadable image was skipped") == 2
    paths = [tmp_path / f"output/fit_hashes/zoo_ecoformer_pvtv2_b0{number}.pth" for number in ("", "-1")]
    first, second = (torch.load(path, weights_only=True) for path in paths)
    assert first["hashes"]["images"] == 6 and len(first["hashes"]["errors"]) == 3
    assert all(after <= before for before, after in first["hashes"]["errors"].values())
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())

    model = timm.create_model("zoo_ecoformer_pvtv2_b0", num_classes=3, checkpoint_path=str(paths[0]), **SIZE)
    taken = torch.load(place / "softmax.pth", weights_only=True)["state_dict"]
    query = taken["module.stages.1.blocks.0.mixer.qkv.weight"].chunk(3)[0]
    assert torch.equal(model.stages[1].blocks[0].mixer.qk.weight, query)
    assert torch.equal(
        model.stages[1].blocks[0].mixer.hash.mean, first["state_dict"]["stages.1.blocks.0.mixer.hash.mean"]
    )

    data = ["--data-dir", str(place / "d"), "--skip-bad-images", "-j", "0", "--device", "cpu"]
    assert run_tool("eval", "--checkpoint", str(paths[0]), *data) == 0
    assert '"img_size": 64' in (said := capsys.readouterr().out) and '"images": 6' in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("red/0.png", "the following arguments are required: --checkpoint"),
        ("red/0.png --checkpoint softmax.pth", "zoo_ecoformer_pvtv2_b0_msa as built has no hash functions to fit"),
        ("red/0.png --checkpoint weights.pth", "which model? give --model"),
        ("red/0.png --checkpoint nowhere", "no checkpoint at nowhere"),
        ("red/0.png MODEL --checkpoint weights.pth", "It is probably a checkpoint of another variant"),
        ("red/0.png MODEL --checkpoint lacking.pth", "8 missing: stages.0.blocks.0.mlp.fc1.weight"),
        ("red/0.png MODEL --checkpoint softmax.pth --output weights.pth", "weights.pth exists already"),
        ("red/0.png MODEL --checkpoint softmax.pth --num-images 0", "--num-images: expected a number at least 1"),
        ("red/0.png MODEL --checkpoint softmax.pth --img-size 32", "1 maps of 16 tokens are too few for 25 anchors"),
        ("red MODEL --checkpoint softmax.pth", "cannot use the image red/bad.png"),
        ("red/bad.png MODEL --checkpoint softmax.pth --skip-bad-images", "no image could be used"),
        ("nowhere MODEL --checkpoint softmax.pth", "no images at nowhere"),
    ],
)
def test_what_a_user_can_mend_is_one_message(place, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(place / "d/val")
    for name in ("softmax.pth", "weights.pth", "lacking.pth"):
        flags = flags.replace(name, str(place / name))
    model = "--model zoo_ecoformer_pvtv2_b0"
    assert run_tool("fit_hashes", *flags.replace("MODEL", model).split(), *FLAGS) == 1
    said = capsys.readouterr().err
    assert message in said.replace(f"{place}/", "") and "Traceback" not in said
    assert not (place / "d/val/output").exists()
