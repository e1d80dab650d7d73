"""No way into the engine runs code from a file, and non-commercial weights need a word."""

import pytest
import timm
from engine.helpers import TINY, run_tool, write_pickle_that_runs

from visionzoo.engine.errors import UserError
from visionzoo.engine.models import build_model
from visionzoo.engine.options import changed
from visionzoo.engine.training import train


@pytest.mark.parametrize(
    "change",
    [
        {"resume": "{path}"},
        {"initial_checkpoint": "{path}"},
        {"kd_checkpoint": "{path}"},
        {"pretrained_path": "{path}"},
        {"resume": "auto", "experiment": "hurt"},
    ],
    ids=lambda change: next(iter(change)) + str(len(change)),
)
def test_training_refuses_a_pickle_that_runs_code_by_name(make_args, tmp_path, change):
    path, witness = tmp_path / "evil.pth", tmp_path / "witness"
    if change["resume" if "resume" in change else next(iter(change))] == "auto":
        (tmp_path / "output/hurt").mkdir(parents=True)
        write_pickle_that_runs(tmp_path / "output/hurt/last.pth.tar", witness)
        with pytest.raises(UserError, match=r"none of 1 checkpoint .*last\.pth\.tar is refused"):
            train(make_args(epochs=1, **change))
    else:
        write_pickle_that_runs(path, witness)
        with pytest.raises(UserError) as error:
            train(make_args(**{name: value.format(path=path) for name, value in change.items()}))
        assert "evil.pth" in str(error.value) and ("refused" in str(error.value) or "blocked" in str(error.value))
    assert not witness.exists()


@pytest.mark.parametrize("tool", ["eval", "predict", "convert"])
def test_the_other_commands_refuse_it_too(images, tmp_path, tool, capsys):
    path, witness = tmp_path / "evil.pth", tmp_path / "witness"
    write_pickle_that_runs(path, witness)
    common = ["--checkpoint", str(path), "--device", "cpu", "--model", TINY["model"]]
    flags = {
        "eval": [*common, "--data-dir", str(images)],
        "predict": [str(images), *common],
        "convert": [TINY["model"], str(path), str(tmp_path / "folder")],
    }[tool]
    assert run_tool(tool, *flags) == 1
    said = capsys.readouterr().err
    assert "evil.pth is refused" in said and "Traceback" not in said
    assert not witness.exists()


def test_weights_given_as_pretrained_are_taken_with_another_head(make_args, trained, tmp_path):
    import torch

    from visionzoo.engine.checkpoints import read_checkpoint

    path = str(trained[0] / "model_best.pth.tar")
    args = make_args(num_classes=5)
    overlay = {"file": path, "num_classes": -1}
    model = build_model(args.model, args.input, pretrained_path=path, pretrained_cfg_overlay=overlay)
    weights = read_checkpoint(path)["state_dict_ema"]
    assert torch.equal(model.state_dict()["stages.0.blocks.0.norm1.weight"], weights["stages.0.blocks.0.norm1.weight"])
    assert model.state_dict()["head.fc.weight"].shape[0] == 5


def test_non_commercial_weights_need_a_flag(make_args, monkeypatch):
    def create(name, pretrained, **arguments):
        assert "non_commercial" not in arguments  # timm's own models do not know the word
        model = original(name)
        model.pretrained_cfg = {**model.pretrained_cfg, "license": "cc-by-nc-4.0"}
        return model

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr("visionzoo.models._network.get_hf_file_metadata", lambda *_, **__: None)
    args = make_args(model="test_convnext", pretrained=True, model_kwargs={})
    with pytest.raises(UserError, match="--non-commercial"):
        build_model(args.model, args.input)
    build_model(changed(args.model, non_commercial=True), args.input)
