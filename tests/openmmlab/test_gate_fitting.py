"""`visionzoo fit-gate`: gates that evaluate as their table says, and what it refuses."""

import json

import pytest
from engine.helpers import ROOT, run_tool

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from visionzoo.openmmlab.flags import eval_parser
from visionzoo.openmmlab.running import evaluate

CONFIG = ROOT / "configs/segmentation/eco-mask2former_zoo-biformer_digits.py"
PLAIN = ROOT / "configs/segmentation/semantic-fpn_zoo-biformer_digits.py"
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
FEW = [f"{name}.{key}" for name in LOADERS for key in ("num_workers=0", "persistent_workers=False", "batch_size=2")]
FEW += ["train_dataloader.dataset.indices=4", "default_hooks.checkpoint.interval=1", "train_cfg.max_iters=1"]
FEW += ["model.decode_head.pixel_decoder.encoder.num_layers=3", "model.decode_head.transformer_decoder.num_layers=1"]
FEW += ["model.backbone.depths=[1,1,1,1]", "train_cfg.val_interval=1", "model.decode_head.exit_weights=[0.5,0,1]"]
SLIDE = [f"model.test_cfg.{setting}" for setting in ("mode=slide", "crop_size=[64,64]", "stride=[64,64]")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of one step, on a few small scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISIONZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("visionzoo.data.scenes.COUNTS", {"train": 4, "validation": 3})
        folder = tmp_path_factory.mktemp("trained")
        flags = ["--work-dir", str(folder), "--seed", "0", "--cfg-options", *FEW]
        assert run_tool("train", str(CONFIG), *flags) == 0
        yield folder / "iter_1.pth"


def fit(folder, trained, *more, config=CONFIG, options=()):
    flags = ["--checkpoint", str(trained), "--work-dir", str(folder), *more, "--cfg-options", *FEW, *options]
    return run_tool("fit_gate", str(config), *flags)


def test_exits_and_gates_evaluate_as_the_table_says(trained, tmp_path, capsys):
    assert fit(tmp_path / "gate", trained, "--beta", "0", "0.5") == 0
    result = json.loads((tmp_path / "gate/gate.json").read_text())
    assert (result["learned_images"], result["images"], result["input_size"]) == (4, 3, [128, 128])
    assert [entry["layers"] for entry in result["exits"]] == [1, 3], "an exit without weight is none"
    first, last = result["exits"]
    cheap = result["gates"][1]
    assert cheap["layers"] == 1 and cheap["shares"] == [1, 0] and cheap["gmacs"] == first["gmacs"]
    # a layer: 5 products of 336 tokens by 64 x 64 or 64 x 128, and its 96 + 48 columns of offsets and weights
    layer = 336 * 64 * (64 + 64 + 2 * 128 + 4 * 3 * 4 * 3) / 1e9
    assert last["gmacs"] - first["gmacs"] == pytest.approx(2 * layer)
    for name in ("gate.md", "gate.png", "gate-0.pth", "gate-0.5.pth"):
        assert (tmp_path / "gate" / name).stat().st_size
    assert "| 0.5 | 1.00 |" in capsys.readouterr().out
    written = str(tmp_path / "gate" / CONFIG.name)
    for config, checkpoint, expected in (
        (written, tmp_path / "gate/gate-0.pth", result["gates"][0]),
        (written, tmp_path / "gate/gate-0.5.pth", cheap),
        (str(CONFIG), trained, last),
    ):
        flags = ["--checkpoint", str(checkpoint), "--work-dir", str(tmp_path / "eval")]
        flags += ["--cfg-options", *FEW] if config == str(CONFIG) else []
        metrics = evaluate(eval_parser().parse([config, *flags]))
        assert metrics["mIoU"] == pytest.approx(expected["miou"], abs=0.006)
        assert metrics["encoder_layers"] == pytest.approx(expected["layers"])
        out, error = capsys.readouterr()
        assert f"encoder_layers: {metrics['encoder_layers']:.4f}" in out and "another config" not in error


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        (["--beta", "0.1", "0.1"], [], "--beta: each once, got 0.1 0.1"),
        (["--beta", "0.1", "0.10000001"], [], "each once, got 0.1 0.10000001; files are named by six digits"),
        (["--beta", "-1"], [], "--beta: expected a number at least 0, got -1"),
        (["--checkpoint", "nowhere.pth"], [], "no checkpoint at nowhere.pth"),
        ([], SLIDE, "the gate sees whole images, not windows; set model.test_cfg.mode=whole"),
        ([], ["model.decode_head.exit_weights=[1]"], "exit_weights must be 3 numbers, one for each layer"),
        ([], ["model.decode_head.num_queries=3"], "does not fit the config"),
        (["--work-dir", "done"], [], "--work-dir done has the results of fit-gate already; name another folder"),
    ],
)
def test_wrong_flags_are_named(trained, tmp_path, capsys, monkeypatch, flags, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "done").mkdir()
    (tmp_path / "done/gate.json").touch()
    assert fit(tmp_path / "gate", trained, *flags, options=options) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_config_without_exits_is_named(trained, capsys):
    flags = ["--checkpoint", str(trained), "--work-dir", str(trained.parent / "gate")]
    assert run_tool("fit_gate", str(PLAIN), *flags) == 1
    message = "has no exits to choose from: expected model.decode_head.type 'ExitMask2FormerHead', got 'FPNHead'"
    assert message in capsys.readouterr().err


def test_labels_that_are_resized_are_named(trained, tmp_path, capsys):
    steps = ["LoadImageFromFile", "LoadAnnotations", "Resize", "PackSegInputs"]
    pipeline = [{"type": name} | ({"scale": (64, 64)} if name == "Resize" else {}) for name in steps]
    config = tmp_path / "resized.py"
    config.write_text(f"_base_ = {str(CONFIG)!r}\ntest_dataloader = dict(dataset=dict(pipeline={pipeline!r}))\n")
    assert fit(tmp_path / "gate", trained, config=config) == 1
    message = "in its own size (128, 128), and its labels are (64, 64): put LoadAnnotations after what resizes"
    assert message in capsys.readouterr().err
