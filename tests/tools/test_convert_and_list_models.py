"""A converted folder loads through timm, and the table of docs/models.md is the registry's."""

import re

import pytest
import timm
import torch
from engine.helpers import ROOT, run_tool
from golden import Record, relative_error
from quick import MODELS

from visionzoo.commands import models
from visionzoo.engine.reporting import insert_between
from visionzoo.models._registry import TINY, VARIANTS

PAGE = ROOT / "docs/models.md"


@pytest.fixture
def run(capsys):
    """Run a tool; return its exit code and what it says on its standard error."""

    def run(tool, *arguments):
        code = run_tool(tool, *map(str, arguments))
        return code, capsys.readouterr().err

    return run


def test_a_converted_checkpoint_loads_from_its_folder_and_gives_the_authors_logits(run, tmp_path):
    record = Record("poolformer/poolformer_s12")
    torch.save({"state_dict": record.state_dict()}, tmp_path / "authors.pth.tar")
    code, said = run("convert", "zoo_poolformer_s12", tmp_path / "authors.pth.tar", tmp_path / "out")
    assert code == 0, said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).double().eval()
    with torch.no_grad():
        assert relative_error(model(record.image()), record.arrays["logits"]) <= record.tolerance()
    code, said = run("convert", "zoo_poolformer_s12", tmp_path / "authors.pth.tar", tmp_path / "out")
    assert code == 1 and "is not an empty folder" in said


@pytest.mark.parametrize(
    ("model", "checkpoint", "message"),
    [
        ("zoo_poolformer", "authors.pth", "unknown model 'zoo_poolformer'"),
        ("zoo_poolformer_s12", "nowhere.pth", "no checkpoint at"),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(run, tmp_path, model, checkpoint, message):
    code, said = run("convert", model, tmp_path / checkpoint, tmp_path / "out")
    assert code == 1 and message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_private_repository_needs_one(run, tmp_path):
    code, said = run("convert", "zoo_poolformer_s12", tmp_path / "x.pth", tmp_path / "out", "--private")
    assert code == 1 and "--private is of --push; give that too" in said


@pytest.mark.parametrize(("classes", "code"), [("0", 2), ("-1", 2), ("3", 1)])
def test_numbers_of_classes_and_folders_that_cannot_be_are_refused(run, tmp_path, classes, code):
    (tmp_path / "file").touch()
    found, said = run("convert", "zoo_poolformer_s12", tmp_path / "x.pth", tmp_path / "file", "--num-classes", classes)
    assert found == code and "Traceback" not in said
    assert ("--num-classes" if code == 2 else "is not an empty folder; name a new one") in said


@pytest.mark.parametrize("name", [*TINY][::8])
def test_the_table_of_models_has_the_registrys_rows(name):
    """`make table` writes it anew."""
    row = models.markdown(models.rows(name)).splitlines()[-1]
    assert name in row and row in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_table_of_models_has_the_registrys_models():
    text = PAGE.read_text(encoding="utf-8").split(models.BEGIN)[1].split(models.END)[0]
    assert re.findall(r"^\| `(zoo_\w+)` ", text, re.M) == list(VARIANTS)


@pytest.mark.full
def test_the_table_of_models_is_the_registrys():
    text = PAGE.read_text(encoding="utf-8")
    table = models.rows()
    assert insert_between(text, models.BEGIN, models.END, models.markdown(table)) == text
    assert len(table) == len(MODELS)


def test_models_can_be_filtered(run):
    assert [row[0] for row in models.rows("zoo_davit_[tsb]", only_weights=True)] == [
        "`zoo_davit_t`",
        "`zoo_davit_s`",
        "`zoo_davit_b`",
    ]
    code, said = run("list_models", "zoo_nothing*")
    assert code == 1 and "no model matches 'zoo_nothing*'" in said
    code, said = run("list_models", "zoo_davit_t", "--write", PAGE)
    assert code == 1 and "--write puts the whole table into the file" in said
    code, said = run("list_models", "--write", "nowhere.md")
    assert code == 1 and "error: no file at nowhere.md" in said
