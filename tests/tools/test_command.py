"""The command `visionzoo`: what it lists, how it starts, and configs by name."""

import os
import re
import signal
import subprocess
import sys
from importlib import import_module

import pytest
from engine.helpers import ROOT, run_tool

import visionzoo_cli
from visionzoo import __version__
from visionzoo.commands.parts import KINDS
from visionzoo.engine import UserError, configs, is_openmmlab
from visionzoo.engine.configs import find_config, shipped_configs
from visionzoo.engine.flags import train_parser
from visionzoo.engine.options import settings
from visionzoo.engine.parallel import starter

DETECTOR, CLASSIFIER = "mask-rcnn_zoo-biformer_fpn_digits", "digits_biformer"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `visionzoo` with arguments; return its exit code, output and errors."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["/bin/visionzoo", *argv])
        try:
            visionzoo_cli.main()
        except SystemExit as error:
            return (int(error.code or 0), *capsys.readouterr())
        return (0, *capsys.readouterr())

    return run


def python(*argv, path=str(ROOT)):
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, check=False)


def test_commands_are_modules_and_each_script_is_one_of_them():
    modules = {path.stem for path in (ROOT / "visionzoo/commands").glob("*.py")} - {"__init__"}
    assert modules == {name.replace("-", "_") for name in visionzoo_cli.COMMANDS}
    assert all(callable(import_module(f"visionzoo.commands.{name}").main) for name in modules)
    for path in (ROOT / "tools").glob("*.py"):
        name = path.stem.removeprefix("list_").replace("_", "-")
        assert f'\n    run("{name}")\n' in path.read_text() and name in visionzoo_cli.COMMANDS


def test_the_list_of_commands_and_the_version_come_without_the_package():
    code = (
        "import sys, visionzoo_cli\n"
        "try: visionzoo_cli.main()\n"
        "finally: print(sorted({'torch', 'visionzoo', 'numpy', 'timm'} & set(sys.modules)))"
    )
    done = python("-c", code, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, about in visionzoo_cli.COMMANDS.items():
        assert [line.split(None, 1) for line in done.stdout.splitlines() if about in line] == [[name, about]]
    assert done.stdout.endswith("\n[]\n")
    assert python("-c", code, "--version").stdout == f"{__version__}\n[]\n"


@pytest.fixture
def unread():
    """The end of a pipe whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_where_nobody_reads_a_command_ends_without_a_word(unread, unbuffered, stream):
    code = "import sys, visionzoo_cli\nvisionzoo_cli.main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: unread}
    argv = ["--help"] if stream == "stdout" else ["trian"]
    done = subprocess.run([sys.executable, "-c", code, *argv], env=environment, check=False, **streams)
    assert (done.returncode, done.stdout or b"", done.stderr or b"") == (128 + signal.SIGPIPE, b"", b"")


@pytest.mark.parametrize("argv", [("configs",), ("models", "zoo_davit_t"), ("benchmark", "--help")])
def test_so_does_each_sub_command(unread, monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", ["/bin/visionzoo", *argv])
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(unread), "w"))
    with pytest.raises(SystemExit) as stopped:
        visionzoo_cli.main()
    assert stopped.value.code == 128 + signal.SIGPIPE
    sys.stdout.close()  # what it still held goes nowhere


def test_a_pipe_of_something_else_that_breaks_is_an_error(monkeypatch):
    def fail(_command):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(visionzoo_cli, "_run", fail)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        visionzoo_cli.run("train")


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ((), 2, "usage: visionzoo COMMAND"),
        (("trian",), 1, "error: unknown command 'trian'; did you mean train? (visionzoo --help lists them)\n"),
        (("check_data",), 1, "error: unknown command 'check_data'; did you mean check-data? "),
        (("xyz",), 1, "error: unknown command 'xyz' (visionzoo --help lists them)\n"),
        (("train", "--epoch", "3"), 1, "error: unknown argument --epoch; did you mean --epochs"),
        (("train", "digits_bifromer"), 1, "ships no config of this name; did you mean digits_biformer"),
        (("train", "a/digits_biformer"), 1, "cannot read the config a/digits_biformer"),
        (("compare", DETECTOR), 1, f"{DETECTOR}: expected a .yaml config of classification, got one of OpenMMLab"),
        (("configs", "digit-biformer"), 1, "error: no config's name holds 'digit-biformer' (of "),
        (("license", "zoo_davit"), 1, "error: unknown model 'zoo_davit'"),
        (("models", "davitt_t"), 1, "error: no model matches 'davitt_t' (of "),
        (("parts", "mixers", "windw"), 1, "mixers holds 'windw'; did you mean window?"),
        (("train", "digits_multi_task"), 1, "digits_multi_task is a config of `visionzoo multi-task`, which takes it"),
        (("multi-task", "digits_biformer"), 1, "digits_biformer is a config of `visionzoo train`, which takes it as"),
        (("parts", "mixer"), 1, "error: expected one of mixers, gates, reducers, heads, "),
        (("parts", "mixer"), 1, ", got 'mixer'; did you mean mixers"),
        (("parts", "windw"), 1, "and then a part of a name (visionzoo parts mixers windw), got 'windw'"),
    ],
)
def test_what_cannot_be_is_one_message(command, argv, code, message):
    found, said, error = command(*argv)
    assert found == code and message in error and "Traceback" not in error and not said


def test_parts_are_listed_with_what_they_are(command):
    code, said, _ = command("parts")
    assert code == 0
    for kind, (parts, asked) in KINDS.items():
        assert f"{len(parts)} {kind}: {asked}\n" in said
        for name in parts:
            assert re.search(rf"^  {name} +\S.{{10,}}\.$", said, re.M), name
    code, said, _ = command("parts", "mixers", "windo")
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["cross_window", "window"]


@pytest.mark.parametrize("name", ["attention", "predict", "registers", "sparse-rate"])
def test_a_command_that_draws_names_the_extra_before_it_looks_for_images(command, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = command(name, "nowhere.png", "--checkpoint", "x.pth", "--device", "cpu")
    assert code == 1
    assert error == 'error: matplotlib is not installed; install it with: pip install "visionzoo[train]"\n'


def test_commands_print_what_they_are_asked_for(command):
    assert command("configs", "digits") == (
        0,
        f"classification  {CLASSIFIER}\ndetection  {DETECTOR}\n"
        "segmentation  eco-mask2former_zoo-biformer_digits\nsegmentation  semantic-fpn_zoo-biformer_digits\n"
        "multi_task  digits_multi_task\n",
        "",
    )
    assert command("configs", CLASSIFIER, "--paths")[1] == f"{ROOT / 'configs/classification/digits_biformer.yaml'}\n"
    found = command("models", "davit_t")[1]
    assert "| `zoo_davit_t` |" in found and "1 model, " in found
    assert command("train", "--help")[1].startswith("usage: visionzoo train [CONFIG] [flags]")


def test_licenses_of_code_and_weights_are_printed(command):
    models = ("zoo_davit_t", "zoo_biformer_t", "convnextv2_tiny.fcmae")
    code, said, _ = command("license", *models)
    assert code == 0
    assert "code: apache-2.0, visionzoo's own; the authors' is at https://github.com/dingmyu/davit (mit)" in said
    assert "weights zoo_davit_t.msft_in1k: " in said and "weights: none are published" in said
    assert "cc-by-nc-4.0, from https://huggingface.co/timm/" in said and "non-commercial use only" in said
    assert command("licence", *models) == (0, said, "")


def test_configs_have_names_of_their_own_and_are_found_by_them(tmp_path, monkeypatch):
    paths = [path for path in (ROOT / "configs").glob("*/*") if path.is_file()]
    assert sorted(shipped_configs().values()) == sorted(paths)
    assert all(find_config(path.stem) == path for path in paths)
    monkeypatch.chdir(tmp_path)
    (tmp_path / CLASSIFIER).write_text("epochs: 3")
    for word in (CLASSIFIER, f"x/{CLASSIFIER}", "mine.yaml", str(paths[0])):  # a file wins over a name
        assert str(find_config(word)) == word
    with pytest.raises(UserError, match=f"did you mean {DETECTOR}"):
        find_config(DETECTOR[:-1])


def test_a_name_is_its_file_for_every_flag_that_takes_a_config():
    path = str(shipped_configs()[CLASSIFIER])
    by_path = settings(train_parser().parse_with_config([path, "--epochs", "3"]))
    for words in ([CLASSIFIER], ["-c", CLASSIFIER]):
        by_name = settings(train_parser().parse_with_config([*words, "--epochs", "3"]))
        assert by_name == {**by_path, "config": CLASSIFIER}
    assert by_path["model"] == "zoo_biformer_t" and by_path["epochs"] == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--seed", "1"], False),
        ([CLASSIFIER], False),
        (["x.yaml", "--experiment", DETECTOR], False),  # a name is the first word only
        (["photo.jpg"], False),
        ([DETECTOR, "photo.jpg"], True),
        (["x.py"], True),
        (["--checkpoint", "x.pth", "x.py"], True),
    ],
)
def test_a_config_says_whose_engine_runs_it(words, expected, monkeypatch):
    monkeypatch.setattr(configs, "find_spec", lambda name: name)  # OpenMMLab's packages are there
    assert is_openmmlab(words) is expected
    if expected:
        monkeypatch.setattr(configs, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r'need mmengine.*pip install "visionzoo\[openmmlab\]"'):
            is_openmmlab(words)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("python 'my tools/train.py'", "visionzoo train")),
        (
            {"WORLD_SIZE": "2", "SLURM_PROCID": "0"},
            ("srun python 'my tools/train.py'", "srun python -m visionzoo train"),
        ),
    ],
)
def test_a_run_goes_on_by_what_started_it(environment, expected, monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (starter("my tools/train.py"), starter("visionzoo train")) == expected


@pytest.mark.parametrize("start", [["-c", "import visionzoo_cli; visionzoo_cli.main()"], ["-m", "visionzoo"]])
def test_ctrl_c_during_the_imports_of_a_command_is_no_traceback(start, tmp_path):
    for name in ("numpy", "timm", "torch"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = python(*start, "train", path=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_the_scripts_name_themselves(capsys):
    assert run_tool("train", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: train.py [CONFIG] [flags]")
