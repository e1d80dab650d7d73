"""tools/convert.py on the checkpoints of our own runs."""

import json

import timm
import torch
from engine.helpers import run_tool


def test_a_run_becomes_a_folder_with_its_classes_and_what_was_measured(trained, tmp_path, capsys):
    checkpoint, folder = trained[0] / "model_best.pth.tar", tmp_path / "out"
    (tmp_path / "eval.json").write_text('{"top1": 88.8, "checkpoint": "x", "images": 9}')
    flags = ["--source", "three colors", "--measured", str(tmp_path / "eval.json")]
    code = run_tool("convert", "zoo_biformer_t", str(checkpoint), str(folder), *flags)
    assert code == 1 and "whose weights are these" in capsys.readouterr().err
    code = run_tool("convert", "zoo_biformer_t", str(checkpoint), str(folder), *flags, "--license", "cc0-1.0")
    assert code == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == ["blue", "green", "red"] and config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    card = (folder / "README.md").read_text()
    assert "| top1 | 88.8 |" in card and "license: cc0-1.0" in card and "three colors" in card
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    averaged = torch.load(checkpoint, weights_only=True)["state_dict_ema"]
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())
