"""A converted folder loads through timm, and the README's table is the registry's."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from golden import Record, relative_error
from quick import MODELS

from visionzoo.engine.reporting import insert_between

ROOT = Path(__file__).resolve().parents[2]


def _run(tool, *arguments):
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=None)


def _module(tool):
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_converted_checkpoint_loads_from_its_folder_and_gives_the_authors_logits(tmp_path):
    record = Record("poolformer/poolformer_s12")
    torch.save({"state_dict": record.state_dict()}, tmp_path / "authors.pth.tar")
    done = _run("convert", "zoo_poolformer_s12", tmp_path / "authors.pth.tar", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).double().eval()
    with torch.no_grad():
        assert relative_error(model(record.image()), record.arrays["logits"]) <= record.tolerance()
    again = _run("convert", "zoo_poolformer_s12", tmp_path / "authors.pth.tar", tmp_path / "out")
    assert again.returncode == 1 and "is not empty" in again.stderr


@pytest.mark.parametrize(
    ("model", "checkpoint", "message"),
    [
        ("zoo_poolformer", "authors.pth", "unknown model 'zoo_poolformer'"),
        ("zoo_poolformer_s12", "nowhere.pth", "no checkpoint at"),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(tmp_path, model, checkpoint, message):
    done = _run("convert", model, tmp_path / checkpoint, tmp_path / "out")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("classes", "code"), [("0", 2), ("-1", 2), ("3", 1)])
def test_numbers_of_classes_and_folders_that_cannot_be_are_refused(tmp_path, classes, code):
    (tmp_path / "file").touch()
    done = _run("convert", "zoo_poolformer_s12", tmp_path / "x.pth", tmp_path / "file", "--num-classes", classes)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("--num-classes" if code == 2 else "or no folder; name a new one") in done.stderr


def test_the_readmes_table_is_the_registrys():
    """`make table` writes it anew."""
    tool = _module("list_models")
    text = (ROOT / "README.md").read_text()
    assert insert_between(text, tool.BEGIN, tool.END, tool.markdown(tool.rows())) == text
    assert len(tool.rows()) == len(MODELS)


def test_models_can_be_filtered():
    tool = _module("list_models")
    assert [row[0] for row in tool.rows("zoo_davit_[tsb]", only_weights=True)] == [
        "`zoo_davit_t`",
        "`zoo_davit_s`",
        "`zoo_davit_b`",
    ]
    done = _run("list_models", "zoo_nothing*")
    assert done.returncode == 1 and "no model matches 'zoo_nothing*'" in done.stderr
    done = _run("list_models", "davit", "--write", "nowhere.md")
    assert done.returncode == 1 and "error: no file at nowhere.md" in done.stderr
