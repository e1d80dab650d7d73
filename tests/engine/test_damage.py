"""Damaged folders, networks that are not there, places that cannot be written: one message."""

import json
import pickle
import shutil

import pytest
import timm
import torch
from engine.helpers import run_tool
from PIL import Image
from safetensors.torch import save_file

import visionzoo
from visionzoo.engine.errors import UserError
from visionzoo.engine.reporting import SUMMARY, read_rows
from visionzoo.models import _registry

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of a sound model of three classes, with an image beside."""
    root = tmp_path_factory.mktemp("good")
    Image.new("RGB", (40, 40)).save(root / "x.png")
    model = timm.create_model("test_convnext", num_classes=3)
    torch.save(model.state_dict(), root / "w.pth")
    return visionzoo.save_pretrained(model, root / "m", license="mit", class_names=["a", "b", "c"])


def cut(bytes_left):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:bytes_left])


def config(text=None, **entries):
    def change(folder):
        path = folder / "config.json"
        content = json.loads(path.read_text()) | entries
        kept = {name: value for name, value in content.items() if value is not None}
        path.write_text(json.dumps(kept) if text is None else text)

    return change


def instead(content):
    def change(folder):
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return change


def fewer(folder):
    weights = timm.create_model("test_convnext", num_classes=3).state_dict()
    save_file(dict(list(weights.items())[:3]), folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut(0), "it is damaged or no model of timm's: SafetensorError"),
        (cut(100), "it is damaged or no model of timm's: SafetensorError"),
        (cut(20000), "it is damaged or no model of timm's: SafetensorError"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no weights for local-dir:"),
        (lambda folder: (folder / "config.json").unlink(), "Config file not found"),
        (fewer, "Missing key"),
        (config("{"), "cannot build local-dir:"),
        (config("[]"), "it is damaged or no model of timm's"),
        (config(architecture=None), "it is damaged or no model of timm's: KeyError: 'architecture'"),
        (config(architecture="nothing"), "Unknown model (nothing)"),
        (config(num_classes=5), "size mismatch for head.fc.weight"),
        (config(num_classes=5, model_args={"num_classes": 3}), "are of 5 classes, the model is asked to have 3"),
        (config(label_names=["a", "b"]), "names 2 classes, the model has 3"),
        (config(model_args={"nope": 3}), "unexpected keyword argument 'nope'"),
        (config(pretrained_cfg={"mean": "x", "num_classes": 3}), "records mean='x', which is not a valid setting"),
        (config(pretrained_cfg={"input_size": [3, -1, 2]}), "3, -1, 2"),
        (config(pretrained_cfg={"unknown": 3}), "unexpected keyword argument 'unknown'"),
        (instead(b"abc"), "it is damaged or no model of timm's"),
        (instead(pickle.dumps({"a": print})), "weights_only=True blocked"),
    ],
)
def test_a_damaged_folder_is_one_message(good, tmp_path, change, message, capsys):
    folder = shutil.copytree(good, tmp_path / "m")
    change(folder)
    flags = ["--pretrained", "--model", f"local-dir:{folder}", "--device", "cpu", "--output", str(tmp_path / "o")]
    assert run_tool("predict", str(good.parent / "x.png"), *flags) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_names_by_number_are_in_the_order_of_the_numbers(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "m")
    config(label_names={"2": "c", "10": "d", "0": "a"})(folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert visionzoo.models._hub.published(model)["class_names"] == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("model", "repository"),
    [
        ("zoo_poolformer_s12", "timm/poolformer_s12.sail_in1k"),
        ("resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("hf-hub:someone/model", "someone/model"),
    ],
)
def test_without_a_network_it_is_said_what_was_tried_and_what_to_do(tmp_path, monkeypatch, capsys, model, repository):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv = ["--model", model, "--pretrained", "--dataset", "visionzoo/digits", "--device", "cpu"]
    assert run_tool("eval", *argv) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: the weights of {model} are neither in the cache {tmp_path / 'cache'} nor ")
    assert f"https://huggingface.co/{repository} (OfflineModeIsEnabled)" in said
    assert "--initial-checkpoint FILE" in said and "--checkpoint FILE" in said


@pytest.mark.parametrize("error", [ConnectionError("no route"), OSError(101, "Network is unreachable"), RuntimeError()])
def test_a_push_without_a_network_leaves_nothing_in_the_way(tmp_path, monkeypatch, capsys, error):
    def create_repo(self, *_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    model = timm.create_model("zoo_poolformer_s12", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    argv = ["zoo_poolformer_s12", str(tmp_path / "w.pth"), str(tmp_path / "m"), "--num-classes", "3"]
    for _ in range(2):
        assert run_tool("convert", *argv, "--push", "me/x", "--license", "mit") == 1
        said = capsys.readouterr().err
        assert f"cannot push to me/x: {type(error).__name__}" in said and "was not written" in said
    assert not (tmp_path / "m").exists()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    model = timm.create_model("test_convnext", num_classes=3)
    (tmp_path / "there").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        for name in ("there", "new"):
            with pytest.raises(OSError, match="No space"):
                visionzoo.save_pretrained(model, tmp_path / name, license="mit")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    visionzoo.save_pretrained(model, tmp_path / "there", license="mit")
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"config.json", "README.md", WEIGHTS}
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not an empty folder"):
        visionzoo.save_pretrained(model, tmp_path / "file", license="mit")


@pytest.mark.parametrize("call", ["predict", "eval", "export", "convert", "list_models"])
def test_a_place_that_cannot_be_written_is_one_message(good, tmp_path, call, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "page.md").write_bytes(b"\xff\xfe")
    model = ["--model", "test_convnext", "--num-classes", "3", "--checkpoint", str(good.parent / "w.pth")]
    argv = {
        "predict": [str(good.parent / "x.png"), *model, "--device", "cpu", "--output", str(tmp_path / "file/o")],
        "eval": [*model, "--results-csv", str(tmp_path)],
        "export": [*model, "--format", "pt2", "--img-size", "64", "--output", str(tmp_path / "file/o")],
        "convert": ["zoo_poolformer_s12", str(good.parent / "w.pth"), str(tmp_path / "file/o"), "--num-classes", "3"],
        "list_models": ["--write", str(tmp_path / "page.md")],
    }[call]
    if call == "list_models":  # of which one is enough
        monkeypatch.setattr(_registry, "VARIANTS", {"zoo_davit_t": _registry.VARIANTS["zoo_davit_t"]})
    if call == "convert":
        monkeypatch.setattr("visionzoo.load_weights", lambda *_, **__: "")
    assert run_tool(call, *argv) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot ")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("epoch,train_loss\n0,0.5\n1,0.4\n", 2),
        ("\ufeffepoch,train_loss\r\n0,0.5\r\n", 1),  # saved by a spreadsheet
        ("epoch,train_loss,mine\n0,0.5,\n", 1),
        ("epoch;train_loss\n0;0,5\n", None),
        ("epoch,train_loss\n0,5,2\n", None),
        ("epoch,train_loss\n0,half\n", None),
        ("epoch,train_loss\n,0.5\n", None),
        ("no table", None),
        ("", 0),
    ],
)
def test_an_edited_summary_is_read_or_kept_aside(tmp_path, text, rows):
    (tmp_path / SUMMARY).write_text(text, encoding="utf-8", newline="")
    found, note = read_rows(tmp_path / SUMMARY)
    if rows is None:
        assert found == [] and "summary-1.csv" in note
        assert (tmp_path / "summary-1.csv").read_bytes() == text.encode() and not (tmp_path / SUMMARY).exists()
    else:
        assert len(found) == rows and not note
        assert all(row["epoch"] == str(number) for number, row in enumerate(found))


def test_a_summary_that_cannot_be_read_stops_nothing(tmp_path):
    (tmp_path / SUMMARY).write_bytes(b"\xff\xfe\x00")
    assert read_rows(tmp_path / SUMMARY)[0] == []
    assert read_rows(tmp_path / "none.csv") == ([], "")


def test_edited_tables_of_exports_are_refused_by_their_row(tmp_path):
    from visionzoo.deploy.sweep import COLUMNS, read_rows

    line = "m,pt2,64x64,batch,1e-6,0.5,3,1.0,,versions"
    (tmp_path / "t.csv").write_text(f"{','.join(COLUMNS)}\n{line}")
    assert len(read_rows(tmp_path / "t.csv")) == 1
    for broken in (line.replace("0.5", "half"), f"{line},more", line.replace(",versions", "")):
        (tmp_path / "t.csv").write_text(f"{','.join(COLUMNS)}\n{line}\n{broken}\n")
        with pytest.raises(UserError, match=r"t\.csv, row 3: .*name another --results-csv"):
            read_rows(tmp_path / "t.csv")


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_an_export_to_a_full_disk_is_one_message(tmp_path, monkeypatch, format):
    from visionzoo.deploy import Reference, Shape, export

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    model, shape = torch.nn.Flatten(), Shape(1, (3, 2, 2))
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    monkeypatch.setattr("torch.onnx.ONNXProgram.save", full)
    with pytest.raises(UserError, match=rf"cannot write .*x\.{format}: No space left on device"):
        export(model, tmp_path / f"x.{format}", format, shape, Reference.of(model, shape))
    assert not list(tmp_path.iterdir())
