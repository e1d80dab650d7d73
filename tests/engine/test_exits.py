"""tools/eval.py --exits and what takes its thresholds: calibrated as the authors do, counted, saved and used."""

import json

import pytest
import timm
import torch
from early_exit import NAME
from engine.helpers import run_tool
from engine.test_auxiliary import FAMILY

from visionzoo.engine.errors import UserError
from visionzoo.engine.exits import RATIOS, Seen, calibrate, choose_thresholds, first_sure, shares_of
from visionzoo.engine.training import train
from visionzoo.exits import ExitModel

NAMES = ("early", "latent", "cnn", "end")


@pytest.fixture(scope="module")
def place(tmp_path_factory, images):
    """A folder with a checkpoint of the tiny family with exits, its flags, and those of the images."""
    from visionzoo.engine.flags import train_parser

    folder = tmp_path_factory.mktemp("exits")
    parser = train_parser()
    parser.set_defaults(**FAMILY, img_size=32, batch_size=12, epochs=1, workers=0, device="cpu", opt="adamw", lr=1e-2)
    parser.set_defaults(warmup_epochs=0, data_dir=str(images), output=str(folder), experiment="run")
    train(parser.parse_with_config([]))
    flags = ["--checkpoint", str(folder / "run/last.pth.tar"), "--device", "cpu"]
    return folder / "run", flags, ["--data-dir", str(images), "--split", "train", "-j", "0", "-b", "7"]


def test_shares_are_the_authors():
    """Of ratio 0.5 over four exits, by hand, with the factors of Dynamic Perceiver; all sum to 1."""
    shares = shares_of(0.5, NAMES, {"early": 0.85, "cnn": 0.5})
    first = 8 / 15 * 0.85
    rest = 1 - first
    second = rest * 4 / 7
    third = rest * 2 / 7 * 0.5
    assert shares == pytest.approx([first, second, third, 1 - first - second - third])
    assert shares_of(2.0, NAMES, {}) == pytest.approx([1 / 15, 2 / 15, 4 / 15, 8 / 15])
    assert (RATIOS[0], RATIOS[16], RATIOS[17], RATIOS[-1]) == (0.2, 1.0, 20 / 19, 4.0) and len(RATIOS) == 32
    assert sorted(RATIOS) == list(RATIOS)
    assert all(sum(shares_of(ratio, NAMES, {"early": 0.85})) == pytest.approx(1) for ratio in RATIOS)


def test_thresholds_let_each_exit_answer_its_share_of_what_is_left():
    sure = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5], [0.99, 0.1, 0.2, 0.3, 0.4], [0.5] * 5, [1.0] * 5])
    thresholds = calibrate(sure, NAMES, [0.4, 0.45, 0.1, 0.05])
    assert thresholds == {"early": pytest.approx(0.8), "latent": pytest.approx(0.3)}  # cnn: less than one image
    assert first_sure(sure, thresholds, NAMES).tolist() == [0, 0, 3, 1, 1]
    assert calibrate(sure, NAMES, [0.0, 0.0, 1.0, 0.0]) == {"cnn": 0.5}
    seen = Seen(sure, torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5, [0, 0, 1, 0, 0]], dtype=torch.bool))
    assert seen.top1(thresholds, NAMES) == (pytest.approx(60), pytest.approx([0.4, 0.4, 0, 0.2]))
    assert calibrate(torch.ones(4, 5), NAMES, [0.2, 0.4, 0.2, 0.2]) == {"early": 1.0}  # ties stop together


def test_exits_are_calibrated_measured_saved_and_used(place, tmp_path, capsys):
    folder, flags, data = place
    assert run_tool("eval", *flags, *data, "--exits", "--calibration-share", "0.4") == 0
    said = capsys.readouterr().out
    path = folder / "eval-last-exits.json"
    result = json.loads(path.read_text())
    assert (folder / "eval-last-exits.png").stat().st_size > 1000
    assert (folder / "eval-last-exits.md").read_text() in said and "| exit | top-1 | GMACs | images/s |" in said
    assert [entry["exit"] for entry in result["exits"]] == ["early", "taught", "end"]
    assert result["images"] + result["calibration_images"] == 36 and result["calibration_images"] >= 5
    assert result["exits"][0]["gmacs"] == result["exits"][1]["gmacs"] < result["exits"][2]["gmacs"]
    for setting in result["settings"]:
        assert sum(setting["shares"].values()) == pytest.approx(1, abs=1e-5)
        low, high = result["exits"][0]["gmacs"], 1.01 * result["exits"][2]["gmacs"]
        assert low <= setting["gmacs"] <= high and setting["images_per_second"] > 0
    assert run_tool("eval", *flags, *data, "--exits") == 0  # another result stands beside it
    assert (folder / "eval-last-exits-1.json").exists() and json.loads(path.read_text()) == result

    image, out = str(data[1] + "/validation/red/0.png"), str(tmp_path / "o")
    cheapest = result["settings"][0]["gmacs"]
    assert run_tool("predict", image, *flags, "--output", out, "--exits", str(path), "--budget", str(cheapest)) == 0
    assert run_tool("predict", image, *flags, "--output", out, "--thresholds", "early=0") == 0
    (line,) = [json.loads(line) for line in (tmp_path / "o/predictions.jsonl").read_text().splitlines()]
    assert line["exit"] == "early" and len(line["classes"]) == 3
    capsys.readouterr()
    for more, message in (
        (["--exits", str(path), "--budget", "1e-9"], f"the settings of {path} need {cheapest} GMACs an image and more"),
        (["--exits", str(path), "--thresholds", "early=1"], "--exits together with --thresholds; give one"),
        (["--budget", "1"], "--budget chooses among the settings of a file"),
        (["--thresholds", "early=2"], "'early' must be a probability from 0 to 1 at which the exit answers, got 2"),
        (["--thresholds", "erly=0.5"], "no exit 'erly' (did you mean 'early'?); it has early, taught"),
        (["--exits", str(folder / "summary.csv")], "summary.csv is not a result of `visionzoo eval --exits`"),
        (["--exits", "nowhere.json"], "cannot read nowhere.json (--exits): No such file"),
    ):
        assert run_tool("predict", image, *flags, "--output", out, *more) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--calibration-share", "1"], "argument --calibration-share: expected a number"),
        (["--calibration-share", "0.999"], "are too few; give more, or another --calibration-share than 0.999"),
        (["--results-csv", "t.csv"], "--exits has a table of its own"),
        (["--torchcompile"], "--exits runs a model part by part"),
        (["--results-file", "x.txt"], "end it in .json"),
    ],
)
def test_what_does_not_go_with_exits_is_refused(place, more, message, capsys):
    assert run_tool("eval", *place[1], *place[2], "--exits", *more) == 1
    assert message in capsys.readouterr().err


def test_exits_of_a_model_without_any_and_thresholds_of_another_are_refused(place, trained, tmp_path, capsys):
    flags = ["--checkpoint", str(trained[0] / "last.pth.tar"), "--device", "cpu"]
    assert run_tool("eval", *flags, *place[2], "--exits") == 1
    assert "zoo_biformer_t: BiFormer as built has no exits" in capsys.readouterr().err
    content = {"model": NAME, "settings": [{"thresholds": {}, "gmacs": 1, "calibration_top1": 1}]}
    (tmp_path / "e.json").write_text(json.dumps(content))
    assert run_tool("predict", place[2][1], *flags, "--exits", str(tmp_path / "e.json")) == 1
    assert f"is of {NAME}, and this model is zoo_biformer_t" in capsys.readouterr().err


def test_the_best_setting_within_a_budget_is_chosen():
    settings = [
        {"thresholds": {"early": t}, "gmacs": gmacs, "calibration_top1": top1}
        for t, gmacs, top1 in ((0.1, 1.0, 50.0), (0.2, 2.0, 70.0), (0.3, 3.0, 70.0), (0.4, 4.0, 60.0))
    ]
    content = {"settings": settings}
    assert choose_thresholds(content, None, "f") == choose_thresholds(content, 2.5, "f") == {"early": 0.2}
    assert choose_thresholds(content, 1.0, "f") == {"early": 0.1}
    with pytest.raises(UserError, match=r"--budget 0\.5: the settings of f need 1\.0 GMACs"):
        choose_thresholds(content, 0.5, "f")


def test_an_exit_is_exported_alone(place, tmp_path, capsys):
    flags = [*place[1], "--format", "pt2", "--output", str(tmp_path)]
    assert run_tool("export", *flags, "--exit", "early") == 0
    assert json.loads((tmp_path / f"{NAME}-early.json").read_text())["exit"] == "early"
    state = torch.load(place[0] / "last.pth.tar", weights_only=True)["state_dict"]
    model = timm.create_model(NAME, num_classes=3)
    model.load_state_dict(state)
    image = torch.randn(2, 3, 32, 32)
    loaded = torch.export.load(tmp_path / f"{NAME}-early.pt2").module()
    torch.testing.assert_close(loaded(image), ExitModel(model, "early")(image), rtol=1e-4, atol=1e-5)
    assert run_tool("export", *flags, "--exit", "erly") == 1
    assert f"--exit erly: {NAME}: EarlyExit has no exit 'erly' (did you mean 'early'?)" in capsys.readouterr().err
