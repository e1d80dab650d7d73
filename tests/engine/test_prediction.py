import json

import numpy as np
import pytest
import timm
import torch
from engine.helpers import truncate
from PIL import Image

from visionzoo.engine.errors import UserError
from visionzoo.engine.prediction import find_images, predict
from visionzoo.engine.trained_flags import predict_parser
from visionzoo.explanation.pictures import dimmed


def predicted(tmp_path, *flags):
    return predict(predict_parser().parse([*map(str, flags), "--device", "cpu", "--output", str(tmp_path / "out")]))


def test_each_image_gets_a_picture_and_a_line(trained, images, tmp_path):
    results = predicted(tmp_path, images / "validation", "--checkpoint", trained[0] / "model_best.pth.tar")
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert lines == results
    assert len(results) == 9
    assert len({result["picture"] for result in results}) == 9  # 0.png of three folders
    for result in results:
        with Image.open(result["picture"]) as picture:
            assert picture.width > 500 and len(picture.convert("RGB").getcolors(1_000_000)) > 50
        assert [c["name"] for c in result["classes"]].count(result["image"].split("/")[-2]) == 1
        assert sum(c["probability"] for c in result["classes"]) == pytest.approx(1, abs=1e-4)
        assert result["classes"] == sorted(result["classes"], key=lambda c: -c["probability"])
    right = sum(result["classes"][0]["name"] == result["image"].split("/")[-2] for result in results)
    assert right >= 7


def test_files_folders_and_patterns_are_found(images):
    red = images / "validation/red"
    assert list(find_images([str(red / "1.png")])) == [red / "1.png"]
    assert (
        list(find_images([str(red)])) == list(find_images([str(red / "*.png")])) == [red / f"{i}.png" for i in range(3)]
    )
    assert len(list(find_images([str(images / "**/*.png")]))) == 45
    with pytest.raises(UserError, match="no images at nowhere"):
        list(find_images(["nowhere"]))


def test_an_unreadable_image_is_named_or_passed_over(trained, images, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes((images / "validation/red/0.png").read_bytes())
    truncate(bad)
    flags = (bad, images / "validation/red/1.png", "--checkpoint", trained[0] / "last.pth.tar")
    with pytest.raises(UserError, match=r"cannot use the image .*bad\.png"):
        predicted(tmp_path, *flags)
    assert not (tmp_path / "out").exists()
    assert len(predicted(tmp_path, *flags, "--skip-bad-images")) == 1
    said = capsys.readouterr().out
    assert "1 unreadable image was skipped" in said and "--skip-bad-images" not in said  # it is given


def test_names_can_be_given(trained, images, tmp_path):
    (tmp_path / "names.txt").write_text("azul\nverde\nrojo\n")
    image = images / "validation/red/0.png"
    flags = ("--checkpoint", trained[0] / "last.pth.tar", "--class-names")
    result = predicted(tmp_path, image, *flags, tmp_path / "names.txt", "--topk", 1)[0]
    assert [c["name"] for c in result["classes"]] == ["rojo"]
    (tmp_path / "names.txt").write_text("azul")
    with pytest.raises(UserError, match=r"the model has 3 classes, .* names 1"):
        predicted(tmp_path, image, *flags, tmp_path / "names.txt")
    with pytest.raises(UserError, match="cannot read the class names nowhere"):
        predicted(tmp_path, image, *flags, "nowhere")
    with pytest.raises(UserError, match="imagenet names 1000"):
        predicted(tmp_path, image, *flags, "imagenet")


def test_a_thousand_classes_are_imagenets(images, tmp_path):
    import timm

    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "w.pth")
    flags = ("--checkpoint", tmp_path / "w.pth", "--model", "test_convnext", "--img-size", 64)
    classes = predicted(tmp_path, images / "validation/red/0.png", *flags)[0]["classes"]
    assert len(classes) == 5
    assert all(not c["name"].startswith("class ") and len(c["name"]) > 1 for c in classes)  # one is the ox


def test_patches_whose_tokens_are_gone_are_dim(images, tmp_path):
    small = {"depth": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("zoo_deit_t", **small)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    options = [f"{key}={value}" for key, value in small.items() if key != "num_classes"]
    flags = ("--model", "zoo_deit_t", "--num-classes", 3, "--img-size", 64, "--checkpoint", tmp_path / "model.pth")
    flags = (images / "validation/red/0.png", *flags, "--show-tokens", "--model-kwargs", *options)
    with pytest.raises(UserError, match="--show-tokens: DeiT as built has no reducers; give it some, such as"):
        predicted(tmp_path, *flags)
    results = predicted(tmp_path, *flags, "reduce=representation_shift")
    with Image.open(results[0]["picture"]) as picture:
        assert picture.width > 1500 and picture.height < 500  # three views beside the image


def test_dimmed_patches_are_those_of_the_mask():
    kept = np.array([[True, False], [True, True], [False, True]])
    view = dimmed(np.ones((40, 32, 3)), kept)
    assert view.shape == (40, 32, 3) and view[:14, :16].min() == 1
    assert view[:14, 16:].max() == pytest.approx(0.2) and view[28:, :16].max() == pytest.approx(0.2)


def test_a_seed_repeats_what_is_random(trained, images, tmp_path):
    image, drawn = images / "validation/red/1.png", []
    for before in range(2):
        torch.manual_seed(before)
        predicted(tmp_path, image, "--checkpoint", trained[0] / "last.pth.tar", "--seed", 7)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)
