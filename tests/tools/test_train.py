"""The commands as a user types them: exit codes, messages, several processes."""

import csv
import os
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from engine.helpers import ROOT, TINY_FLAGS, Child, run_tool, write_splits


def test_training_from_a_config_leaves_a_run_folder(tmp_path, capsys):
    write_splits(tmp_path / "d")
    (tmp_path / "c.yaml").write_text("epochs: 1\nmodel: test_convnext\n")
    flags = [*TINY_FLAGS, "--data-dir", str(tmp_path / "d"), "--output", str(tmp_path / "o"), "--epochs", "2"]
    assert run_tool("train", str(tmp_path / "c.yaml"), *flags) == 0
    (folder,) = (tmp_path / "o").iterdir()
    assert folder.name.endswith("-test_convnext-32")
    assert (folder / "model_best.pth.tar").exists()
    assert f"run folder {folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x.py"], "x.py"),  # there is none, or OpenMMLab is not installed; see tests/openmmlab/test_tools.py
        (["--epoch", "3"], "unknown argument --epoch; did you mean --epochs"),
        (["nowhere.yaml"], "cannot read the config nowhere.yaml"),
        (["--device", "cpu", "--data-dir", "nowhere"], "no data at nowhere"),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_exit_code_1(argv, message, capsys):
    assert run_tool("train", *argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said
    assert "Traceback" not in said and said.count("\n") == 1


def test_help_lists_the_flags(capsys):
    assert run_tool("train", "--help") == 0
    said = capsys.readouterr().out
    assert "--model-ema-decay" in said and "(default: 0.9998)" in said


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr("visionzoo.engine.training.train", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runpy.run_path(str(ROOT / "tools/train.py"), run_name="__main__")


def start(*command: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_ctrl_c_during_the_imports_is_no_traceback(tool, tmp_path):
    for name in ("numpy", "safetensors", "timm", "torch", "visionzoo"):  # whichever is first; each stands for seconds
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_after_the_imports_is_a_message(capsys, monkeypatch):
    monkeypatch.setattr("visionzoo.engine.flags.train_parser", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run_tool("train") == 128 + signal.SIGINT
    assert capsys.readouterr().err == "\nstopped by SIGINT\n"


def test_ctrl_c_in_the_shell_stops_all_its_processes_and_says_how_to_go_on(tmp_path):
    write_splits(tmp_path / "d")
    flags = ["--data-dir", str(tmp_path / "d"), "--output", str(tmp_path / "o"), "--experiment", "e", "-j", "2"]
    flags = [*TINY_FLAGS, *flags, "--model", "test_convnext", "--epochs", "100000"]
    last = tmp_path / "o/e/last.pth.tar"
    run = Child(tmp_path / "log", "train", *flags)
    run.wait_for(last.exists)
    code, said = run.stop(signal.SIGINT, to="group")  # a terminal sends it to all of a group
    assert code == 128 + signal.SIGINT, said
    assert f"saved {tmp_path / 'o/e/recovery.pth.tar'}; continue with: python {ROOT / 'tools/train.py'} " in said
    assert "Traceback" not in said
    torch.load(last, weights_only=True)


@pytest.mark.slow
def test_two_processes_train_one_model_and_only_the_first_writes(tmp_path):
    write_splits(tmp_path / "d", val_per_class=3)  # 9 to validate on do not divide by 2
    flags = [*TINY_FLAGS, "--data-dir", str(tmp_path / "d"), "--output", str(tmp_path / "o"), "--experiment", "e"]
    flags += ["--model", "test_convnext", "--epochs", "2", "--model-ema", "--grad-accum-steps", "2"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(*launcher, str(ROOT / "tools/train.py"), *flags)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("run folder") == 1
    assert "2 x cpu" in said
    with (tmp_path / "o/e/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    nine_times = float(rows[-1]["eval_top1"]) / 100 * 9
    assert nine_times == pytest.approx(round(nine_times), abs=1e-4)  # each image counted once
    state = torch.load(tmp_path / "o/e/last.pth.tar", weights_only=True)
    assert not any(name.startswith("module.") for name in state["state_dict"])
