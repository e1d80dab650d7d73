"""tools/eval.py and tools/predict.py over a run that tools/train.py wrote."""

import json

import pytest
from engine.helpers import TINY_FLAGS, run_tool, write_splits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_splits(root / "d")
    flags = [*TINY_FLAGS, "--data-dir", str(root / "d"), "--output", str(root / "o"), "--experiment", "e"]
    assert run_tool("train", *flags, "--model", "test_convnext", "--epochs", "1") == 0
    return root


def test_a_checkpoint_alone_is_evaluated(run, capsys):
    checkpoint = run / "o/e/model_best.pth.tar"
    assert run_tool("eval", "--checkpoint", str(checkpoint), "--device", "cpu", "-j", "0", "--recorded-data") == 0
    result = json.loads((run / "o/e/eval-model_best.json").read_text())
    assert (result["model"], result["images"]) == ("test_convnext", 6)
    assert f'"top1": {result["top1"]}' in capsys.readouterr().out


def test_images_are_classified_by_a_checkpoint_alone(run, tmp_path):
    flags = ["--checkpoint", str(run / "o/e/last.pth.tar"), "--device", "cpu", "--output", str(tmp_path)]
    assert run_tool("predict", str(run / "d/val/blue"), *flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert {c["name"] for c in lines[0]["classes"]} == {"blue", "green", "red"}


@pytest.mark.parametrize(
    ("tool", "argv", "message"),
    [
        ("eval", [], "which model?"),
        ("eval", ["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        ("eval", ["--chekpoint", "x"], "unknown argument --chekpoint; did you mean --checkpoint"),
        ("predict", [], "the following arguments are required: IMAGE"),
        ("predict", ["nowhere.jpg", "--model", "test_convnext"], "no images at nowhere.jpg"),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_exit_code_1(tool, argv, message, capsys):
    assert run_tool(tool, *argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and "Traceback" not in said
