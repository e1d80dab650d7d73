"""Nothing that is there is replaced unless it was asked for again: inputs, earlier results, other exports."""

import csv
import json

import pytest
import torch
from engine.helpers import run_tool, write_images
from PIL import Image

from visionzoo.deploy import Shape
from visionzoo.deploy.files import write_files
from visionzoo.deploy.flags import export_parser
from visionzoo.engine.errors import UserError, printable
from visionzoo.engine.evaluation import COLUMNS, _default_file
from visionzoo.engine.outputs import add_rows, check_table, free_path


@pytest.fixture
def place(tmp_path, monkeypatch, trained):
    """A folder of two photos, in which the tests run, and the flags of a checkpoint."""
    write_images(tmp_path / "x", per_class=1, seed=3)
    for colour in ("red", "blue"):
        (tmp_path / "x" / colour / "0.png").rename(tmp_path / f"{colour}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path, ["--checkpoint", str(trained[0] / "last.pth.tar"), "--device", "cpu"]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(path="predictions.jsonl"):
    with open(path) as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("source", ["red.png", "."])
def test_predict_into_the_folder_of_the_photos_leaves_them_and_takes_no_own_picture(place, source, capsys):
    folder, flags = place
    before = content(folder)
    for _ in range(2):
        assert run_tool("predict", source, *flags, "--output", ".") == 0
    after = content(folder)
    assert {path: after[path] for path in before} == before
    images = ["blue.png", "red.png", "x/green/0.png"] if source == "." else ["red.png"]
    assert sorted(line["image"] for line in lines()) == images
    assert len(after) == len(before) + len(images) + 1  # the same image asked for again has its own picture anew
    said = capsys.readouterr().out
    assert (f"skipped {len(images)} pictures of earlier predictions" in said) == (source == ".")
    assert run_tool("predict", "*-1.png", *flags) == 1
    assert "no images at *-1.png but" in capsys.readouterr().err


def test_predict_keeps_the_results_of_other_images(place):
    folder, flags = place
    assert run_tool("predict", "red.png", *flags, "--output", "o") == 0
    (first,) = lines("o/predictions.jsonl")
    before = (folder / "o/red.png").read_bytes()
    assert run_tool("predict", "x/green/0.png", *flags, "--output", "o") == 0
    (folder / "other").mkdir()
    (folder / "blue.png").rename(folder / "other/red.png")
    assert run_tool("predict", "other/red.png", *flags, "--output", "o", "--topk", "1") == 0
    assert (folder / "o/red.png").read_bytes() == before
    assert lines("o/predictions.jsonl")[0] == first and len(lines("o/predictions.jsonl")) == 3
    assert lines("o/predictions.jsonl")[2]["picture"] == "o/red-1.png"


def test_predict_without_a_folder_makes_a_new_one(place):
    _, flags = place
    for name in ("red.png", "blue.png"):
        assert run_tool("predict", name, *flags) == 0
    assert [line["image"] for line in lines("output/predict/predictions.jsonl")] == ["red.png"]
    assert [line["image"] for line in lines("output/predict-1/predictions.jsonl")] == ["blue.png"]


@pytest.mark.parametrize("text", ["[1]", '{"image": 3}', "no JSON", '{"image": "a", "picture": "b"}\n{"ima'])
def test_predict_refuses_a_folder_whose_lines_are_others(place, text, capsys):
    folder, flags = place
    (folder / "predictions.jsonl").write_text(text)
    assert run_tool("predict", "red.png", *flags, "--output", ".") == 1
    assert "predictions.jsonl is there and holds other than predictions" in capsys.readouterr().err
    assert (folder / "predictions.jsonl").read_text() == text and not (folder / "red-1.png").exists()


def test_a_free_name_is_one_at_which_nothing_lies(tmp_path):
    path = tmp_path / "a.b.png"
    assert free_path(path) == path
    path.touch()
    (tmp_path / "a.b-1.png").symlink_to("nowhere")
    assert free_path(path).name == "a.b-2.png"
    assert free_path(path, {tmp_path / "a.b-2.png"}).name == "a.b-3.png"
    assert free_path(path, own=[path]) == path
    (tmp_path / "folder").mkdir()
    assert free_path(tmp_path / "folder").name == "folder-1"


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("a/exp_v1.0.pth", "a/eval-exp_v1.0.json"),
        ("exp_v1.5.pth.tar", "eval-exp_v1.5.json"),
        ("exp.v2", "eval-exp.v2.json"),
        ("last.pth.tar", "eval-last.json"),
        ("model.safetensors", "eval-model.json"),
        ("", "output/eval/tmp_v1_0-32.json"),
    ],
)
def test_results_of_two_checkpoints_have_two_names(checkpoint, name):
    assert str(_default_file({"model": "local-dir:tmp/v1.0", "img_size": 32}, checkpoint)) == name


def test_eval_names_data_and_split_and_keeps_the_result_on_other_images(place, images, trained):
    folder, _ = place
    (folder / "run").mkdir()
    (folder / "run/v1.0.pth.tar").write_bytes((trained[0] / "last.pth.tar").read_bytes())
    flags = ["--checkpoint", "run/v1.0.pth.tar", "--device", "cpu", "-j", "0", "--data-dir", str(images)]
    results = []
    for more in ([], ["--split", "train"], ["--no-ema"], []):
        assert run_tool("eval", *flags, *more) == 0
        names = sorted(path.name for path in (folder / "run").glob("*.json"))
        results.append([json.loads((folder / "run" / name).read_text()) for name in names])
    assert names == ["eval-v1.0-1.json", "eval-v1.0-2.json", "eval-v1.0.json"]
    assert results[3] == results[2] and results[0][0] == results[3][2]
    assert results[0][0]["data"] == str(images) and results[0][0]["split"] == "validation"
    assert results[3][0]["split"] == "train" and results[3][1]["averaged_weights"] is False
    assert results[0][0]["averaged_weights"] is True
    state = torch.load(folder / "run/v1.0.pth.tar", weights_only=True)
    torch.save({name: value for name, value in state.items() if "ema" not in name}, folder / "run/plain.pth.tar")
    assert run_tool("eval", "--checkpoint", "run/plain.pth.tar", *flags[2:]) == 0
    assert json.loads((folder / "run/eval-plain.json").read_text())["averaged_weights"] is False


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("--results-file", "a photo", "exists and is not a result of `visionzoo eval`"),
        ("--results-file", "[1]", "exists and is not a result of `visionzoo eval`"),
        ("--results-csv", "model;top1\na;1\n", "expected the columns model, img_size, top1"),
        ("--results-csv", "epoch,loss\n1,2\n", "its first line is epoch, loss"),
    ],
)
def test_eval_writes_into_no_other_file(place, flag, text, message, capsys):
    folder, flags = place
    (folder / "there").write_text(text)
    assert run_tool("eval", *flags, "-j", "0", flag, "there") == 1
    assert message in capsys.readouterr().err and (folder / "there").read_text() == text


def test_rows_are_added_to_a_table_as_it_is(tmp_path):
    path = tmp_path / "new/t.csv"
    add_rows(path, ("a", "b"), [{"a": 1, "b": 2, "c": 3}])
    for before in (path.read_bytes(), b"a,b\n1,2", b"\xef\xbb\xbfa,b\r\n1,2\r\n", b"\xef\xbb\xbfa,b\r\n1,2"):
        path.write_bytes(before)
        add_rows(path, ("a", "b"), [{"a": 3, "b": 4}])
        assert path.read_bytes().startswith(before)
        with path.open(encoding="utf-8-sig") as file:
            assert list(csv.DictReader(file)) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    for text in (b"a\n", b"b,a\n", b"a,b,c\n", b"\xff\xfea\x00", b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(text)
        with pytest.raises(UserError, match=r"expected the columns a, b|cannot read the table"):
            add_rows(path, ("a", "b"), [{"a": 3, "b": 4}])
        assert path.read_bytes() == text
    path.write_bytes(b"")
    add_rows(path, ("a", "b"), [{"a": 3, "b": 4}])
    assert path.read_text() == "a,b\n3,4\n"
    check_table(tmp_path / "none.csv", COLUMNS)


def test_what_would_steer_a_terminal_is_escaped():
    assert printable("a\x1b[2J\udce9 猫\n") == "a\\x1b[2J\\udce9 猫\n"


def test_a_second_export_replaces_no_other_model(tmp_path, capsys):
    first, second = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval() for _ in range(2))

    def exported(model, *flags, mean=0.5):
        args = export_parser().parse(["--format", "pt2", *flags])
        description = {"mean": mean, "outputs": [{"name": "logits"}]}
        write_files(model, tmp_path / "m", Shape(1, (3, 2, 2)), description, args.files)
        return content(tmp_path)

    before = exported(first)
    (tmp_path / "m.onnx").write_text("of the first")
    described = json.loads((tmp_path / "m.json").read_text())
    described["files"].append({"file": "m.onnx", "largest_error": 0.0, "checked": []})
    (tmp_path / "m.json").write_text(json.dumps(described))
    after = exported(first)
    names = [entry["file"] for entry in json.loads((tmp_path / "m.json").read_text())["files"]]
    assert names == ["m.pt2", "m.onnx"] and set(after) - set(before) == {tmp_path / "m.onnx"}
    for model, mean in ((second, 0.5), (first, 0.4)):
        with pytest.raises(UserError, match=r"holds m\.json, m\.pt2, m\.onnx of another model.*pass --overwrite"):
            exported(model, mean=mean)
        assert content(tmp_path) == after
    assert set(exported(second, "--overwrite")) == {tmp_path / "m.json", tmp_path / "m.pt2"}
    assert "m.onnx of the earlier export is removed" in capsys.readouterr().out
    (tmp_path / "m.json").unlink()
    with pytest.raises(UserError, match=r"holds m\.pt2 of another model"):
        exported(second)


def test_a_picture_that_a_user_has_replaced_is_the_users(place):
    folder, flags = place
    assert run_tool("predict", "red.png", *flags, "--output", "o") == 0
    Image.new("RGB", (8, 8)).save(folder / "o/red.png")
    before = (folder / "o/red.png").read_bytes()
    assert run_tool("predict", "red.png", *flags, "--output", "o") == 0
    assert (folder / "o/red.png").read_bytes() == before and (folder / "o/red-1.png").exists()
