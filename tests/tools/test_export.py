"""tools/export.py: a checkpoint to files that say what they are, models to a table, and what is refused."""

import csv
import importlib.util
import json

import pytest
import timm
import torch
from engine.helpers import TINY_FLAGS, count_reads, run_tool, write_splits

from visionzoo.deploy import command
from visionzoo.deploy.flags import export_parser

if not importlib.util.find_spec("onnxscript"):
    pytest.skip('needs pip install "visionzoo[export]"', allow_module_level=True)


def test_a_checkpoint_alone_becomes_files_that_are_described(tmp_path, capsys):
    write_splits(tmp_path / "d")
    flags = [*TINY_FLAGS, "--data-dir", str(tmp_path / "d"), "--output", str(tmp_path / "o"), "--experiment", "e"]
    small = ["depths=[1,1]", "embed_dims=[8,16]"]
    model = ["--model", "zoo_poolformer_s12", "--model-kwargs", *small, "--mean", "0.4", "0.5", "0.6"]
    assert run_tool("train", *flags, *model, "--epochs", "1") == 0
    checkpoint = str(tmp_path / "o/e/last.pth.tar")
    output = tmp_path / "files"
    assert run_tool("export", "--checkpoint", checkpoint, "--output", str(output), "--format", "pt2", "onnx") == 0
    assert "onnx: " in (said := capsys.readouterr().out) and "any batch, 32x32" in said
    assert {path.name for path in output.iterdir()} == {f"zoo_poolformer_s12.{end}" for end in ("pt2", "onnx", "json")}
    content = json.loads((output / "zoo_poolformer_s12.json").read_text())
    assert content["class_names"] == ["blue", "green", "red"] and content["preprocessing"]["mean"] == [0.4, 0.5, 0.6]
    assert content["input"] == {"name": "image", "shape": ["batch", 3, 32, 32], "dtype": "float32"}
    assert content["outputs"] == [{"name": "logits", "shape": ["batch", 3]}]
    assert [entry["file"] for entry in content["files"]] == ["zoo_poolformer_s12.pt2", "zoo_poolformer_s12.onnx"]

    run = torch.load(checkpoint, weights_only=True)
    network = timm.create_model("zoo_poolformer_s12", num_classes=3, depths=[1, 1], embed_dims=[8, 16]).eval()
    network.load_state_dict(run["state_dict"])
    image = torch.randn(5, 3, 32, 32)
    loaded = torch.export.load(output / "zoo_poolformer_s12.pt2").module()
    torch.testing.assert_close(loaded(image), network(image), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_read_once_also_where_its_weights_say_how_many_classes_there_are(tmp_path, monkeypatch):
    network = timm.create_model("test_convnext", num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    reads = count_reads(monkeypatch)
    monkeypatch.setattr(command, "write_files", lambda *written: [written])
    flags = ["--model", "test_convnext", "--checkpoint", str(tmp_path / "bare.pth"), "--output", str(tmp_path)]
    (written,) = command.export_model(export_parser().parse(flags))
    assert reads == [str(tmp_path / "bare.pth")]
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(written[0](image), network(image))


def test_a_sweep_makes_a_table_and_goes_on_where_it_stopped(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "# Exports\n<!-- table of exports: written by tools/export.py --all -->\n"
        "<!-- end of the table of exports -->\nafter\n"
    )
    flags = ["--all", "zoo_poolformer_s12", "--img-size", "64", "--output", str(tmp_path), "--format"]
    assert run_tool("export", *flags, "pt2", "--write", str(page)) == 0
    assert "torch.export with dynamic batch holds for: zoo_poolformer_s12" in capsys.readouterr().out
    before = (tmp_path / "export.csv").read_text()
    (row,) = csv.DictReader(before.splitlines())
    assert (row["model"], row["format"], row["input"], row["axes"]) == ("zoo_poolformer_s12", "pt2", "64x64", "batch")
    assert float(row["error"]) < 1e-3 < float(row["spread"]) and not row["failure"]
    assert "| `zoo_poolformer_s12` | 64x64 | " in page.read_text() and page.read_text().endswith("after\n")
    assert run_tool("export", *flags, "pt2") == 0
    assert (tmp_path / "export.csv").read_text() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which model? give --model, or --checkpoint"),
        (["--model", "zoo_davit_t"], "zoo_davit_t has no weights: give --checkpoint or --pretrained, or --random"),
        (["--model", "zoo_davit_q", "--random-weights"], "unknown model 'zoo_davit_q'; did you mean zoo_davit"),
        (["--model", "zoo_davit_q"], "unknown model 'zoo_davit_q'; did you mean zoo_davit"),
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--model", "x", "--random-weights", "--pretrained"], "together with --checkpoint or --pretrained"),
        (["--format", "tflite"], "invalid choice: 'tflite'"),
        (["--batch-size", "4"], "add --static-batch"),
        (["--static-batch", "--batch-size", "0"], "--batch-size: expected a positive number, got 0"),
        (["--torchcompile"], "--format aoti compiles"),
        (["--dynamic_size"], "unknown argument --dynamic_size; did you mean --dynamic-size"),
        (["--all", "zoo_nothing*"], "no model matches zoo_nothing*"),
        (["--all", "--model", "x"], "--all together with --model"),
        (["--all", "none", "--channels-last"], "--channels-last has no effect on --all"),
        (["--all", "none", "--overwrite"], "--overwrite has no effect on --all"),
        (["--model", "x", "--results-csv", "x.csv"], "--results-csv is of the table that --all makes"),
        (["--torchcompile-mode", "default"], "--format aoti compiles"),
        (["--model", "test_vit", "--random-weights", "--img-size", "97"], "the model does not take"),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_exit_code_1(argv, message, capsys):
    assert run_tool("export", *argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and "Traceback" not in said


def test_a_missing_package_is_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    assert run_tool("export", "--model", "zoo_davit_t", "--random-weights") == 1
    assert 'onnxscript is not installed; install it with: pip install "visionzoo[export]"' in capsys.readouterr().err
