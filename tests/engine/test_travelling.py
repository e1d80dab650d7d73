"""Classes, image mode, size and normalization are those of the training however a model is loaded, in every tool."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from engine.helpers import TINY, restored, run_tool, write_images
from PIL import Image

from visionzoo.deploy.flags import export_parser
from visionzoo.engine.errors import UserError
from visionzoo.engine.evaluation import evaluate_checkpoint
from visionzoo.engine.images import to_mode
from visionzoo.engine.prediction import predict
from visionzoo.engine.trained_flags import eval_parser, predict_parser
from visionzoo.models._hub import save_pretrained

MODES = {"RGB": 3, "HSV": 3, "YCbCr": 3, "LAB": 3, "L": 1, "LA": 2, "RGBA": 4, "CMYK": 4}
NAMES = ["red", "blue", "green"]  # in no order that a folder would give


def write_run(path, mode, **more):
    """Write the checkpoint of a run with images of a mode, and return it."""
    channels = MODES[mode]
    args = {**TINY, "num_classes": 3, "in_chans": channels, "input_img_mode": mode, **more}
    model = timm.create_model(args["model"], num_classes=3, in_chans=channels, **args["model_kwargs"])
    config = {"input_size": (channels, 32, 32), "mean": (0.4,) * channels, "std": (0.3,) * channels}
    config |= {"interpolation": "bilinear", "crop_pct": 0.6, "crop_mode": "center"}
    state = {"args": args, "state_dict": model.state_dict(), "data_config": config, "class_names": NAMES}
    torch.save(state, path)
    return state


def folder_of(state, where):
    args = state["args"]
    model = timm.create_model(args["model"], num_classes=3, in_chans=args["in_chans"], **args["model_kwargs"])
    model.load_state_dict(state["state_dict"])
    return save_pretrained(
        model, where, license="mit", class_names=NAMES, data_config={**args, **state["data_config"]},
        model_args={**args["model_kwargs"], "in_chans": args["in_chans"]},
    )  # fmt: skip


def ways(tmp_path, mode, **more):
    """The flags of each way in which one model is loaded."""
    state = write_run(tmp_path / "run.pth.tar", mode, **more)
    folder_of(state, tmp_path / "folder")
    assert (
        run_tool("convert", TINY["model"], str(tmp_path / "run.pth.tar"), str(tmp_path / "out"), "--license", "x") == 0
    )
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    save_pretrained(again, tmp_path / "again", license="mit", model_args=TINY["model_kwargs"])
    timms = {**state["args"], "mean": [0.4] * MODES[mode], "std": [0.3] * MODES[mode], "crop_pct": 0.6}
    timms = argparse.Namespace(**timms, interpolation="bilinear")
    torch.save({"args": timms, "state_dict": state["state_dict"], "arch": TINY["model"]}, tmp_path / "timm.pth.tar")
    folders = {name: ["--pretrained", "--model", f"local-dir:{tmp_path / name}"] for name in ("folder", "out", "again")}
    checkpoints = {name: ["--checkpoint", str(tmp_path / f"{name}.pth.tar")] for name in ("run", "timm")}
    checkpoints["files"] = ["--checkpoint", str(tmp_path / "folder")]
    checkpoints["file"] = ["--checkpoint", str(tmp_path / "folder/model.safetensors")]
    return {**checkpoints, **folders}


@pytest.mark.parametrize("mode", ["HSV", "L", "RGBA"])
def test_every_way_of_loading_prepares_images_alike(tmp_path, mode):
    random = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "d" / name).mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (50, 40, 3)).astype("uint8")).save(tmp_path / "d" / name / "0.png")
    found = {}
    for name, flags in ways(tmp_path, mode, multi_label=False).items():
        flags = [*flags, "--device", "cpu"]
        lines = predict(predict_parser().parse([str(tmp_path / "d"), *flags, "--output", str(tmp_path / name)]))
        numbers = [{entry["index"]: entry["probability"] for entry in line["classes"]} for line in lines]
        if name != "timm":  # whose checkpoints hold no names
            assert {entry["index"]: entry["name"] for entry in lines[0]["classes"]} == dict(enumerate(NAMES))
        class_map = ["--class-map", str(tmp_path / "names.txt")] if name == "timm" else []
        (tmp_path / "names.txt").write_text("\n".join(NAMES))
        args = eval_parser().parse([*flags, *class_map, "--data-dir", str(tmp_path / "d"), "-j", "0"])
        loss = evaluate_checkpoint(args)["loss"]
        truth = [line["image"].split("/")[-2] for line in lines]
        own = -np.mean([np.log(each[NAMES.index(right)]) for each, right in zip(numbers, truth, strict=True)])
        assert own == pytest.approx(loss, abs=1e-4)  # predict and eval see the same
        trained = restored(export_parser, *flags)
        assert trained.mode == mode and tuple(trained.data_config["input_size"]) == (MODES[mode], 32, 32)
        found[name] = numbers
    for name, numbers in found.items():
        for one, other in zip(numbers, found["run"], strict=True):
            assert one == pytest.approx(other, abs=2e-6), name


def test_upright_images_and_several_labels_travel_too(tmp_path):
    for name, flags in ways(tmp_path, "HSV", multi_label=True, apply_exif_orientation=True).items():
        trained = restored(predict_parser, "x", *flags)
        assert (trained.upright, trained.multi_label, trained.mode) == (True, True, "HSV"), name
    assert restored(predict_parser, "x", *flags, "--input-img-mode", "LAB").mode == "LAB"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stored", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_every_picture_becomes_every_mode(mode, stored):
    image = Image.new("RGB", (4, 4), (200, 100, 50)).convert(stored if stored != "I;16" else "L")
    if stored == "I;16":
        image = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    assert to_mode(image, mode).mode == mode


def test_classes_of_a_folder_are_compared_by_name(tmp_path):
    flags = ways(tmp_path, "RGB")["folder"]
    write_images(tmp_path / "d", per_class=1, seed=0)
    (tmp_path / "d/red").rename(tmp_path / "d/crimson")
    args = eval_parser().parse([*flags, "--device", "cpu", "-j", "0", "--data-dir", str(tmp_path / "d")])
    with pytest.raises(UserError, match="1 class of the evaluated images was not trained on: crimson; the "):
        evaluate_checkpoint(args)


def test_a_thousand_classes_of_ones_own_have_ones_own_names(tmp_path):
    model = timm.create_model("test_convnext")
    names = [f"mine {index}" for index in range(1000)]
    save_pretrained(model, tmp_path / "m", license="mit", class_names=names)
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    flags = ["--pretrained", "--model", f"local-dir:{tmp_path / 'm'}", "--device", "cpu", "--output", str(tmp_path)]
    (line,) = predict(predict_parser().parse([str(tmp_path / "a.png"), *flags]))
    assert all(entry["name"] == f"mine {entry['index']}" for entry in line["classes"])


def test_a_random_classifier_is_refused(tmp_path):
    flags = ways(tmp_path, "RGB")["folder"]
    with pytest.raises(UserError, match=r"the weights of local-dir:.* are of 3 classes, the model is asked to have 5"):
        restored(predict_parser, "x", *flags, "--num-classes", "5")


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.5, 0.5]},
        {"input_size": [3, 32]},
        {"crop_pct": "a"},
        {"input_size": [3, -1, 32]},
        {"interpolation": "best"},
    ],
)
def test_recorded_images_that_cannot_be_are_refused(tmp_path, change):
    state = write_run(tmp_path / "run.pth.tar", "RGB")
    torch.save({**state, "data_config": {**state["data_config"], **change}}, tmp_path / "run.pth.tar")
    with pytest.raises(UserError, match=r"run\.pth\.tar records .* not a valid setting"):
        restored(predict_parser, "x", "--checkpoint", str(tmp_path / "run.pth.tar"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, capsys):
    state = write_run(tmp_path / "run.pth.tar", "RGB")
    state["state_dict"]["head.fc.bias"][1] = value
    torch.save(state, tmp_path / "run.pth.tar")
    write_images(tmp_path / "d", per_class=1, seed=0)
    flags = ["--checkpoint", str(tmp_path / "run.pth.tar"), "--device", "cpu"]
    for tool, argv in {
        "eval": [*flags, "--data-dir", str(tmp_path / "d")],
        "predict": [str(tmp_path / "d"), *flags, "--output", str(tmp_path / "p")],
        "export": [*flags, "--output", str(tmp_path / "e")],
        "convert": [TINY["model"], str(tmp_path / "run.pth.tar"), str(tmp_path / "c"), "--license", "mit"],
    }.items():
        assert run_tool(tool, *argv) == 1
        assert "1 tensor holds NaN or infinite weights, such as head.fc.bias" in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in ("p", "e", "c"))


def test_an_exports_description_says_how_images_are_read(tmp_path):
    for name, flags in ways(tmp_path, "HSV", multi_label=True, apply_exif_orientation=True).items():
        if name == "folder":
            out = tmp_path / f"files-{name}"
            assert run_tool("export", *flags, "--format", "pt2", "--output", str(out)) == 0
            (path,) = out.glob("*.json")
            content = json.loads(path.read_text())
            assert content["class_names"] == NAMES and content["activation"] == "sigmoid"
            expected = {"channels": "HSV", "upright": True, "mean": [0.4] * 3, "std": [0.3] * 3, "crop_pct": 0.6}
            assert content["preprocessing"].items() >= expected.items()


@pytest.mark.parametrize("channels", [1, 4])
def test_means_of_three_channels_are_averaged_as_in_training(tmp_path, channels):
    mode = {1: "L", 4: "RGBA"}[channels]
    state = write_run(tmp_path / "run.pth.tar", mode)
    state["data_config"] |= {"mean": (0.3, 0.4, 0.8), "std": (0.1, 0.2, 0.3)}
    torch.save(state, tmp_path / "run.pth.tar")
    config = restored(predict_parser, "x", "--checkpoint", str(tmp_path / "run.pth.tar")).data_config
    assert config["mean"] == pytest.approx((0.5,) * channels) and config["std"] == pytest.approx((0.2,) * channels)
