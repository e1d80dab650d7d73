"""The commands with a config of OpenMMLab, and mmdet's and mmseg's own inference APIs on what they write."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.helpers import ROOT, Child, run_tool, truncate
from PIL import Image

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

DETECTION = ROOT / "configs/detection/mask-rcnn_zoo-biformer_fpn_digits.py"
SEGMENTATION = ROOT / "configs/segmentation/semantic-fpn_zoo-biformer_digits.py"
FEW = ["train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False", "train_dataloader.batch_size=2"]
FEW += ["val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False", "val_dataloader.dataset.indices=4"]
FEW += [option.replace("val_", "test_") for option in FEW[3:]]
DET_FEW = [*FEW, "train_dataloader.dataset.indices=4", "train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
DET_FEW += ["default_hooks.checkpoint.interval=1", "default_hooks.logger.interval=1", "test_evaluator.metric=bbox"]
DET_FEW += ["model.test_cfg.rcnn.score_thr=0.0"]
SEG_FEW = [*FEW, "train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, monkeypatch_module):
    from visionzoo.data import scenes_folder

    monkeypatch_module.setenv("VISIONZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch_module.setattr("visionzoo.data.scenes.COUNTS", {"train": 8, "validation": 4})
    return scenes_folder()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_scenes_are_what_their_annotations_say(scenes):
    from pycocotools.coco import COCO

    for split, count in (("train", 8), ("validation", 4)):
        coco = COCO(str(scenes / f"detection/{split}.json"))
        assert len(coco.imgs) == count and len(coco.cats) == 10
        for image in coco.imgs.values():
            labels = np.array(Image.open(scenes / "annotations" / split / image["file_name"]))
            picture = np.array(Image.open(scenes / "images" / split / image["file_name"]))
            assert picture.shape == (128, 128, 3) and labels.shape == (128, 128)
            expected = np.ones_like(labels)
            for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
                mask = coco.annToMask(annotation).astype(bool)
                expected[mask] = annotation["category_id"] + 1
                x, y, w, h = annotation["bbox"]
                assert mask.sum() == annotation["area"] == mask[y : y + h, x : x + w].sum()
                assert mask[y].any() and mask[y + h - 1].any() and mask[:, x].any() and mask[:, x + w - 1].any()
            assert np.array_equal(labels, expected)


@pytest.fixture(scope="module")
def detector(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    assert run_tool("train", str(DETECTION), "--work-dir", str(folder), "--seed", "0", "--cfg-options", *DET_FEW) == 0
    return folder


@pytest.fixture(scope="module")
def segmentor(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentor")
    assert (
        run_tool("train", str(SEGMENTATION), "--work-dir", str(folder), "--seed", "0", "--cfg-options", *SEG_FEW) == 0
    )
    return folder


def test_training_leaves_a_checkpoint_a_config_and_logs(detector):
    assert (detector / "epoch_1.pth").exists() and (detector / DETECTION.name).exists()
    scalars = [json.loads(line) for line in next(detector.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    assert sum("loss_mask" in line for line in scalars) == 2
    assert list(detector.glob("*/vis_data/events.out.tfevents*"))


def test_the_zoos_loader_reads_the_backbone_out_of_a_detectors_checkpoint(detector):
    from mmengine.config import Config
    from mmengine.registry import MODELS

    cfg = Config.fromfile(str(detector / DETECTION.name)).model.backbone
    (published,) = detector.glob("epoch_1-????????.pth")  # without the state of training, so without Python objects
    cfg.init_cfg = {"type": "Pretrained", "checkpoint": str(published)}
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    state = torch.load(detector / "epoch_1.pth", weights_only=False)["state_dict"]
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, state[f"backbone.model.{name}"]), name


def test_a_detector_is_evaluated_and_draws_boxes_and_masks(detector, scenes, tmp_path, capsys):
    checkpoint = str(detector / "epoch_1.pth")
    flags = ["--checkpoint", checkpoint, "--work-dir", str(tmp_path / "eval"), "--show-dir", str(tmp_path / "show")]
    # in a process of its own: the hooks draw with the last visualizer made, be it that of a segmentor
    run = Child(tmp_path / "log", "eval", str(DETECTION), *flags, "--cfg-options", *DET_FEW)
    assert run.process.wait() == 0, run.log.read_text()
    assert list((tmp_path / "show").rglob("*.png")), "no pictures of annotation and prediction"
    said, (log,) = run.log.read_text(), (tmp_path / "eval").glob("*/*.log")
    for title, page in (
        ("System env", "PyTorch compiling"),
        ("Config, whole", "default_scope ="),
        ("Hooks", "before_val"),
    ):
        (line,) = [line for line in said.splitlines() if f"INFO - {title}" in line]
        assert line.endswith(f"lines in {log}") and page not in said and page in log.read_text()
    assert "OneDL" not in said and "faster_coco_eval" not in said
    picture = scenes / "images/validation/0000.png"
    flags = ["--checkpoint", checkpoint, "--output", str(tmp_path / "out"), "--score-threshold", "0.0"]
    assert run_tool("predict", str(detector / DETECTION.name), str(picture), *flags) == 0
    assert f"1 picture in {tmp_path / 'out/vis'}" in capsys.readouterr().out
    drawn = np.array(Image.open(tmp_path / "out/vis/0000.png"))
    assert drawn.shape == (128, 128, 3) and (drawn != np.array(Image.open(picture))).any()
    content = json.loads((tmp_path / "out/preds/0000.json").read_text())
    assert len(content["classes"]) == len(content["bboxes"]) == len(content["masks"]) > 0
    assert set(content["classes"]) <= set("0123456789")


def test_a_segmentor_is_evaluated_and_draws_masks(segmentor, scenes, tmp_path, capsys):
    checkpoint = str(segmentor / "iter_2.pth")
    flags = ["--checkpoint", checkpoint, "--work-dir", str(tmp_path / "eval"), "--show-dir", str(tmp_path / "show")]
    # in a process of its own, as above
    run = Child(tmp_path / "log", "eval", str(SEGMENTATION), *flags, "--cfg-options", *SEG_FEW)
    assert run.process.wait() == 0, run.log.read_text()
    assert len(list((tmp_path / "show").rglob("*.png"))) == 4, "no pictures of annotation and prediction"
    pictures = [str(scenes / f"images/validation/000{i}.png") for i in range(2)]
    flags = ["--checkpoint", checkpoint, "--output", str(tmp_path / "out")]
    assert run_tool("predict", str(SEGMENTATION), *pictures, *flags) == 0
    assert {path.name for path in (tmp_path / "out/preds").iterdir()} == {"0000.json", "0001.json"}
    content = json.loads((tmp_path / "out/preds/0000.json").read_text())
    assert sum(content["shares"].values()) == pytest.approx(1) and len(list((tmp_path / "out/vis").iterdir())) == 2


def test_the_page_shows_what_was_found_over_the_picture(detector, segmentor, scenes, monkeypatch):
    from visionzoo.openmmlab import prediction
    from visionzoo.openmmlab.flags import view_parser

    picture = Image.open(scenes / "images/validation/0000.png").convert("RGB")
    for config, checkpoint in ((detector / DETECTION.name, "epoch_1.pth"), (SEGMENTATION, "iter_2.pth")):
        folder = detector if checkpoint == "epoch_1.pth" else segmentor
        flags = ["--checkpoint", str(folder / checkpoint), "--device", "cpu", "--score-threshold", "0"]
        given = view_parser().parse([str(config), *flags])
        served = []
        monkeypatch.setattr(prediction, "serve", lambda viewer, *rest, served=served: served.append((viewer, rest)))
        prediction.view(given)
        ((viewer, rest),) = served
        assert rest == ([], "127.0.0.1", 7860) and viewer.title == config.stem
        found = viewer.look(picture)["classes"]
        shares = [each["probability"] for each in found]
        assert {each["name"] for each in found} and shares == sorted(shares, reverse=True)
        assert config != SEGMENTATION or sum(shares) == pytest.approx(1)
        drawn = np.array(Image.open(io.BytesIO(viewer.draw(picture, "overlay", None)[0])))
        assert drawn.shape == (128, 128, 3) and (drawn != np.array(picture)).any()


def test_the_inferencers_of_mmdet_and_mmseg_take_configs_and_checkpoints(detector, segmentor, scenes):
    from mmdet.apis import DetInferencer
    from mmseg.apis import MMSegInferencer

    picture = str(scenes / "images/validation/0000.png")
    for inferencer in (
        DetInferencer(str(detector / DETECTION.name), str(detector / "epoch_1.pth"), device="cpu"),
        DetInferencer(weights=str(detector / "epoch_1.pth"), device="cpu"),  # the config is in the checkpoint
    ):
        assert "bboxes" in inferencer(picture)["predictions"][0]
    inferencer = MMSegInferencer(str(SEGMENTATION), str(segmentor / "iter_2.pth"), device="cpu")
    assert inferencer(picture)["predictions"].shape == (128, 128)


def test_training_goes_on_from_the_last_checkpoint(segmentor, tmp_path, capsys):
    options = [*SEG_FEW, "train_cfg.max_iters=3"]
    flags = ["--work-dir", str(tmp_path), "--resume", str(segmentor / "iter_2.pth"), "--cfg-options", *options]
    assert run_tool("train", str(SEGMENTATION), *flags) == 0
    assert torch.load(tmp_path / "iter_3.pth", weights_only=False)["meta"]["iter"] == 3


def test_a_checkpoint_of_other_classes_is_refused_with_its_own(detector, scenes, tmp_path, capsys):
    checkpoint = str(detector / "epoch_1.pth")
    few = ["--cfg-options", *DET_FEW]
    for argv in (
        ["eval", "--checkpoint", checkpoint, "--classes", "3,4", "--work-dir", str(tmp_path), *few],
        ["train", "--resume", checkpoint, "--classes", "3,4", "--work-dir", str(tmp_path), *few],
    ):
        assert run_tool(argv[0], str(DETECTION), *argv[1:]) == 1
        said = capsys.readouterr().err
        assert "0 weights are missing and 6 of another shape, such as roi_head.bbox_head.fc_cls.weight (11," in said
        assert "its classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in said
    coco = str(ROOT / "configs/detection/mask-rcnn_zoo-biformer-t_fpn_tiny.py")
    picture = str(scenes / "images/validation/0000.png")
    flags = ["--checkpoint", checkpoint, "--output", str(tmp_path)]
    assert run_tool("predict", coco, picture, *flags) == 1
    assert "does not fit the config: " in capsys.readouterr().err


def test_pictures_that_cannot_be_read_are_named_before_the_first_is_predicted(detector, scenes, tmp_path, capsys):
    shutil.copy(scenes / "images/validation/0000.png", tmp_path / "a.png")
    flags = ["--checkpoint", str(detector / "epoch_1.pth"), "--output", str(tmp_path / "out")]
    for content in (b"", b"text"):
        (tmp_path / "b.png").write_bytes(content)
        assert run_tool("predict", str(DETECTION), str(tmp_path), *flags) == 1
        assert f"error: the picture {tmp_path / 'b.png'} cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_configs_that_cannot_be_read_are_named(tmp_path, capsys):
    for content, message in (("x = (", "was never closed"), ("_base_ = 'nowhere.py'", "nowhere.py")):
        (tmp_path / "config.py").write_text(content)
        assert run_tool("train", str(tmp_path / "config.py")) == 1
        said = capsys.readouterr().err
        assert f"error: the config {tmp_path / 'config.py'} cannot be read: " in said and message in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "model = dict(a=dict(hooks=dict(type='X', n=1)))",
            "model.a.hooks is a part with keys such as type, n, where its _base_ has a list; write a list, or add "
            "_delete_=True to the part to replace what the base has",
        ),
        ("model = dict(b=dict(type='X'))", "model.b is a part with keys such as type, where its _base_ has 3; write a"),
    ],
)
def test_a_part_with_keys_where_the_base_has_none_is_named(content, message, tmp_path, capsys):
    (tmp_path / "base.py").write_text("model = dict(a=dict(hooks=[dict(type='Y')]), b=3)")
    (tmp_path / "middle.py").write_text(f"_base_ = 'base.py'\n{content}")
    (tmp_path / "config.py").write_text("_base_ = 'middle.py'")
    assert run_tool("train", str(tmp_path / "config.py")) == 1
    assert f"error: the config {tmp_path / 'middle.py'} cannot be read: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.backbone=3", "--cfg-options model.backbone: expected a part with keys such as type, pretrained, name"),
        ("model.neck.num_outs.x=3", "--cfg-options model.neck.num_outs.x=3: the config has no such place"),
        ("param_scheduler.9.begin=1", "--cfg-options param_scheduler.9.begin=1: the config has no such place: Index 9"),
        ("model.backbone=None", "model of the config cannot be built: cfg should be a dict"),
        ("model.backbone.depths=3", "ZooBackbone: zoo_biformer_t cannot be built with {'regions': 4, 'depths': 3"),
        ("model.type=Foo", "model of the config cannot be built: Foo is not in the mmdet::model registry"),
        ("model.neck.num_outs=x", "model.neck of the config cannot be built: '>=' not supported between instances"),
        (
            "model.neck.num_outs=x",
            "Its values: type='FPN', in_channels=[32, 64, 128, 256], out_channels=64, num_outs='x'",
        ),
        ("model.neck.num_out=4", "unexpected keyword argument 'num_out'; did you mean num_outs? (TypeError in "),
        ("optim_wrapper.optimizer.lr=x", "optim_wrapper.optimizer of the config cannot be built: '<=' not supported"),
        ("param_scheduler.0.type=Foo", "param_scheduler.0 of the config cannot be built: Foo is not in the"),
        ("default_hooks.logger.foo=1", "default_hooks.logger of the config cannot be built: LoggerHook.__init__() got"),
        (
            "train_cfg.max_epochs=x",
            "train_cfg of the config cannot be built: invalid literal for int() with base 10: 'x'",
        ),
        (
            "train_dataloader.batch_size=x",
            "train_dataloader.batch_sampler of the config cannot be built: batch_size should",
        ),
        (
            "train_dataloader.batchsize=3",
            "train_dataloader of the config cannot be built: DataLoader.__init__() got an",
        ),
        ("train_dataloader.batchsize=3", "unexpected keyword argument 'batchsize'; did you mean batch_size"),
        (
            "train_dataloader.dataset.pipeline.0.foo=1",
            "train_dataloader.dataset.pipeline.0 of the config cannot be built",
        ),
        ("randomness.sed=3", "the config describes no training or evaluation: Runner.set_randomness() got"),
    ],
)
def test_a_part_of_the_config_that_cannot_be_is_named_with_its_values(option, message, scenes, tmp_path, capsys):
    flags = [str(DETECTION), "--work-dir", str(tmp_path), "--cfg-options", *DET_FEW, option]
    assert run_tool("train", *flags) == 1
    said = capsys.readouterr().err
    assert message in said[said.rindex("error: ") :] and "Traceback" not in said


def test_what_fails_in_no_part_of_the_config_keeps_its_traceback(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("mmdet.models.MaskRCNN.train_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_tool("train", str(DETECTION), "--work-dir", str(tmp_path), "--cfg-options", *DET_FEW)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "nowhere.py"], "no config at nowhere.py"),
        (["train", str(DETECTION), "--classes", "cat"], "1 of 1 class not among the annotated categories (cat)"),
        (["train", str(DETECTION), "--dataset", "nowhere.yaml"], "cannot read the dataset nowhere.yaml"),
        (["train", str(DETECTION), "--data-root", "/nowhere"], "no annotations at /nowhere/detection/train.json"),
        (
            ["train", str(DETECTION), "--cfg-options", "model.backbone.name=zoo_biformr_t"],
            "did you mean zoo_biformer_t",
        ),
        (["train", str(DETECTION), "--cfg-options", "model.backbone.pretrained=True"], "pretrained=False"),
        (["train", str(DETECTION), "--resume", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["train", DETECTION.stem, "--resume", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["eval", DETECTION.stem, "--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["predict", DETECTION.stem, "nowhere.png", "--checkpoint", "x.pth"], "no picture at nowhere.png"),
        (["export", SEGMENTATION.stem, "--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["export", DETECTION.stem[:-1], "--checkpoint", "x.pth"], f"did you mean {DETECTION.stem}"),
        (["eval", str(DETECTION), "--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["predict", str(DETECTION), "nowhere.png", "--checkpoint", "x.pth"], "no picture at nowhere.png"),
        (
            ["train", str(DETECTION), "--cfg-options", "modl.neck.num_outs=5"],
            "--cfg-options modl: there is no such part",
        ),
        (["train", "--seed", "1", "nowhere.py"], "no config at nowhere.py"),
        (["eval", "--checkpoint", "nowhere.pth", str(DETECTION)], "no checkpoint at nowhere.pth"),
        (["predict", "--checkpoint", "x.pth", str(DETECTION), "nowhere.png"], "no picture at nowhere.png"),
        (
            ["train", "--cfg-options", "x=1", "nowhere.py"],
            "--cfg-options: expected KEY=VALUE, got 'nowhere.py'; CONFIG.py comes before it",
        ),
        (["check_data", "coco", "/nowhere"], "train2017: not there"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_what_a_user_can_mend_is_one_message_and_exit_code_1(argv, message, scenes, tmp_path, capsys):
    tool, *flags = argv
    if tool == "train" and "nowhere.py" not in flags:
        flags += ["--work-dir", str(tmp_path)]
    assert run_tool(tool, *flags) == 1
    said = capsys.readouterr().err
    assert "error: " in said and message in said and "Traceback" not in said
    assert not list(tmp_path.glob("*.pth"))


def test_amp_without_a_gpu_is_refused(scenes, tmp_path, capsys):
    if torch.cuda.is_available():
        assert run_tool("train", str(DETECTION), "--work-dir", str(tmp_path), "--amp", "--cfg-options", *DET_FEW) == 0
    else:
        assert run_tool("train", str(DETECTION), "--work-dir", str(tmp_path), "--amp") == 1
        assert "--amp: mmengine's mixed precision needs a GPU" in capsys.readouterr().err


def test_py_configs_without_openmmlab_name_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("visionzoo.engine.configs.find_spec", lambda name: None)
    assert run_tool("train", str(DETECTION)) == 1
    assert 'pip install "visionzoo[openmmlab]"' in capsys.readouterr().err


def refused(capsys, tool, *argv):
    """Run a tool that refuses; return its error."""
    assert run_tool(tool, *map(str, argv)) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said[said.rindex("error: ") :]


@pytest.fixture
def renamed(detector, tmp_path):
    """A function that writes the detector's checkpoint with other classes."""

    def write(classes):
        content = torch.load(detector / "epoch_1.pth", weights_only=False)
        content["meta"]["dataset_meta"]["classes"] = tuple(classes)
        torch.save(content, tmp_path / "renamed.pth")
        return tmp_path / "renamed.pth"

    return write


def test_classes_in_another_order_are_refused_and_other_names_said(renamed, scenes, tmp_path, capsys):
    few = ["--work-dir", tmp_path / "run", "--cfg-options", *DET_FEW]
    path = renamed("1023456789")
    for argv in (["eval", DETECTION, "--checkpoint", path, *few], ["train", DETECTION, "--resume", path, *few]):
        said = refused(capsys, *argv)
        assert "has the classes in another order than the config's data (0, 1)" in said
        assert "classes of the checkpoint: 1, 0, 2" in said and "classes of the config: 0, 1, 2" in said
    spoilt = ["optim_wrapper.optimizer.lr=x"]  # so that no training follows
    assert run_tool("train", str(DETECTION), *map(str, few), f"load_from={path}", *spoilt) == 1
    assert "in another order than the config's data: the head has to learn anew" in capsys.readouterr().err
    path = renamed("abcdefghij")
    assert run_tool("eval", str(DETECTION), "--checkpoint", str(path), *map(str, few)) == 0
    assert "was trained with classes of other names" in capsys.readouterr().err


def test_a_start_from_weights_of_which_none_fits_is_refused(scenes, tmp_path, capsys):
    torch.save({"state_dict": {"other.weight": torch.ones(2)}}, tmp_path / "other.pth")
    options = [*DET_FEW, f"load_from={tmp_path / 'other.pth'}"]
    said = refused(capsys, "train", DETECTION, "--work-dir", tmp_path / "run", "--cfg-options", *options)
    assert "none of its weights fits the model, such as backbone.model." in said
    assert not list(tmp_path.rglob("epoch_*"))


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("optim_wrapper.optimizer.lr=0.5", "optim_wrapper.optimizer.lr=0.5, there 0.001"),
        ("optim_wrapper.optimizer.type=SGD", "optim_wrapper.optimizer.type='SGD', there 'AdamW'"),
        ("train_dataloader.batch_size=3", "train_dataloader.batch_size=3, there 2"),
        ("param_scheduler.0.end=7", "param_scheduler.0.end=7, there 50"),
    ],
)
def test_a_resumed_training_refuses_what_it_would_not_use(option, place, detector, scenes, tmp_path, capsys):
    flags = ["--work-dir", tmp_path, "--resume", detector / "epoch_1.pth", "--cfg-options", *DET_FEW, option]
    said = refused(capsys, "train", DETECTION, *flags)
    assert f"the config has changed: {place}" in said and "load_from=" in said


@pytest.mark.parametrize(("name", "number"), [("epoch", -3), ("iter", 10**12), ("iter", float("nan"))])
def test_a_training_goes_on_from_no_absurd_number_of_steps(name, number, detector, scenes, tmp_path, capsys):
    content = torch.load(detector / "epoch_1.pth", weights_only=False)
    content["meta"][name] = number
    torch.save(content, tmp_path / "x.pth")
    flags = ["--work-dir", tmp_path, "--resume", tmp_path / "x.pth", "--cfg-options", *DET_FEW]
    assert f"x.pth records {name}={number}, expected 0 to" in refused(capsys, "train", DETECTION, *flags)


def test_another_config_than_the_trainings_is_said(detector, scenes, tmp_path, capsys):
    flags = ["--checkpoint", str(detector / "epoch_1.pth"), "--work-dir", str(tmp_path), "--cfg-options", *DET_FEW]
    assert run_tool("eval", str(DETECTION), *flags) == 0
    assert "another config" not in capsys.readouterr().err
    assert run_tool("eval", str(DETECTION), *flags, "model.test_cfg.rcnn.nms.iou_threshold=0.3") == 0
    assert "with another config: model.test_cfg.rcnn.nms.iou_threshold=0.3, there 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("max_epochs=2", "max_epochs: nothing reads it, it is only a variable of the config file; did you mean"),
        ("root=/x", "root: nothing reads it"),
        ("model.test_cfg.rcnn.score_thrr=0.1", "nothing reads 'score_thrr'; did you mean score_thr"),
        ('a=[{"x":1,"y":[1,2]}]', "expected a value, or a list [A,B]"),
        ("default_hooks.checkpoint.save_best=bbox_mAP", "CheckpointHook waits for the metric 'bbox_mAP', validation"),
        ("val_evaluator.ann_file=nowhere.json", "nowhere.json"),
        ("model.test_cfg.rcnn.max_per_img=x", "the first batch of val_dataloader cannot be validated"),
    ],
)
def test_settings_that_would_fail_late_or_never_be_read_are_refused(option, message, scenes, tmp_path, capsys):
    flags = ["--work-dir", tmp_path, "--cfg-options", *DET_FEW, option]
    assert message in refused(capsys, "train", DETECTION, *flags)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("tool", ["train", "predict"])
def test_more_boxes_than_a_detector_makes_are_refused_with_the_config(tool, tmp_path, capsys):
    config = tmp_path / "own.py"
    base = DETECTION.parent / "vidt_zoo-swin-n_tiny.py"
    config.write_text(f"_base_ = {str(base)!r}\nmodel = dict(test_cfg=dict(max_per_img=9000))")
    flags = [] if tool == "train" else ["x.jpg", "--checkpoint", "x.pth"]
    said = refused(capsys, tool, config, *flags)
    assert "expected a whole number from 1 to 8000" in said and "got 9000; set it lower, or model.backbone.num" in said


def test_settings_that_mm_reads_are_taken_though_the_config_has_none(scenes):
    from visionzoo.openmmlab.config_errors import merge_options
    from visionzoo.openmmlab.running import read_config

    cfg = read_config(str(DETECTION))
    options = {
        "model.test_cfg.rpn.min_bbox_size": 1,
        "model.train_cfg.rcnn.pos_weight": 2,
        "auto_scale_lr.enable": True,
    }
    merge_options(cfg, {**options, "load_from": "x", "env_cfg.cudnn_benchmark": True, "sync_bn": "torch"})
    assert cfg.model.test_cfg.rpn.min_bbox_size == 1 and cfg.sync_bn == "torch"


def test_what_a_config_file_sets_and_nothing_reads_is_said(tmp_path, capsys):
    from visionzoo.openmmlab.running import read_config

    path = tmp_path / "own.py"
    path.write_text(
        f"_base_ = {str(DETECTION)!r}\nside = 64\nmax_epochs = side\noptim_wraper = {{}}\n"
        "model = dict(test_cfg=dict(rcnn=dict(score_thrr=0.1)), train_cfg=dict(rpn=dict(pos_weight=2)))\n"
    )
    cfg = read_config(str(path))
    assert capsys.readouterr().err.splitlines() == [
        f"note: {path}: nothing reads max_epochs, it is only a variable of this file; did you mean "
        "train_cfg.max_epochs?",
        f"note: {path}: nothing reads optim_wraper, it is only a variable of this file; did you mean optim_wrapper?",
        f"note: {path}: nothing reads model.test_cfg.rcnn.score_thrr; did you mean score_thr?",
    ]
    del cfg.model.test_cfg.rcnn["score_thrr"]
    cfg.dump(tmp_path / "dumped.py")  # with every variable, as training writes it
    read_config(str(tmp_path / "dumped.py"))
    assert capsys.readouterr().err == ""


def test_a_work_folder_that_cannot_be_made_is_named(scenes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = refused(capsys, "train", DETECTION, "--work-dir", tmp_path / "file", "--cfg-options", *DET_FEW)
    assert f"the work folder {tmp_path / 'file'} cannot be made" in said


def test_the_mask_of_each_picture_has_its_name_also_with_a_threshold(segmentor, scenes, tmp_path):
    from mmengine.config import Config

    content = torch.load(segmentor / "iter_2.pth", weights_only=False)
    names = [name for name in content["state_dict"] if "decode_head.conv_seg" in name]
    content["state_dict"].update({name: content["state_dict"][name][:1] for name in names})
    content["meta"]["dataset_meta"] = {"classes": ("ground", "crack"), "palette": [[0, 0, 0], [255, 0, 0]]}
    torch.save(content, tmp_path / "binary.pth")
    cfg = Config.fromfile(str(SEGMENTATION))
    cfg.model.decode_head.update(num_classes=2, out_channels=1, threshold=0.4)
    cfg.model.decode_head.loss_decode = {"type": "CrossEntropyLoss", "use_sigmoid": True}
    cfg.dump(tmp_path / "binary.py")
    pictures = [str(scenes / f"images/validation/000{i}.png") for i in range(2)]
    flags = ["--checkpoint", str(tmp_path / "binary.pth"), "--output", str(tmp_path / "out")]
    assert run_tool("predict", str(tmp_path / "binary.py"), *pictures, *flags) == 0
    assert sorted(path.name for path in (tmp_path / "out/pred").iterdir()) == ["0000.png", "0001.png"]
    mask = np.array(Image.open(tmp_path / "out/pred/0000.png"))
    shares = json.loads((tmp_path / "out/preds/0000.json").read_text())["shares"]
    assert mask.shape == (128, 128) and shares.get("crack", 0) == pytest.approx((mask == 1).mean())


def test_a_threshold_is_part_of_what_an_export_says():
    from types import SimpleNamespace

    from visionzoo.openmmlab.export import _describe_segmentor

    head = SimpleNamespace(out_channels=1, threshold=0.4, align_corners=False)
    described = _describe_segmentor(SimpleNamespace(decode_head=head))
    assert described["threshold"] == 0.4 and described["decode"].endswith("class 1 above the threshold, else class 0")
    head.out_channels = 2
    assert "threshold" not in _describe_segmentor(SimpleNamespace(decode_head=head))


def test_mmengines_own_checkpoint_serves_as_a_backbones_weights(detector):
    from mmengine.config import Config
    from mmengine.registry import MODELS

    cfg = Config.fromfile(str(detector / DETECTION.name)).model.backbone
    cfg.init_cfg = {"type": "Pretrained", "checkpoint": str(detector / "epoch_1.pth")}
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    state = torch.load(detector / "epoch_1.pth", weights_only=False)["state_dict"]
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, state[f"backbone.model.{name}"]), name


def test_annotations_are_counted_from_one_for_cocos_metric(detector, scenes, tmp_path):
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    from visionzoo.openmmlab.checked_runner import CheckingRunner

    content = json.loads((scenes / "detection/validation.json").read_text())
    for shift in (0, 1):
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = number + shift
        (tmp_path / f"{shift}.json").write_text(json.dumps(content))
    DefaultScope.get_instance("ids", scope_name="mmdet")
    numbers = {category["id"]: number for number, category in enumerate(content["categories"])}
    results = []
    for shift in (0, 1):
        cfg = Config.fromfile(str(DETECTION))
        cfg.test_evaluator.update(ann_file=str(tmp_path / f"{shift}.json"), metric="bbox")
        evaluator = CheckingRunner.build_evaluator(None, cfg.test_evaluator)
        (metric,) = evaluator.metrics
        metric.dataset_meta = {"classes": tuple("0123456789")}
        for image in content["images"]:
            boxes = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            found = {
                "img_id": image["id"],
                "bboxes": np.array([[*a["bbox"][:2], *np.add(a["bbox"][:2], a["bbox"][2:])] for a in boxes], float),
                "scores": np.full(len(boxes), 0.9),
                "labels": np.array([numbers[a["category_id"]] for a in boxes]),
            }
            metric.results.append(({"width": 128, "height": 128, "img_id": image["id"]}, found))
        results.append(evaluator.evaluate(len(content["images"]))["coco/bbox_mAP"])
    assert results[0] == results[1] > 0.9


def test_a_batch_norm_of_one_value_is_one_message():
    from mmengine.config import Config

    from visionzoo.engine import UserError
    from visionzoo.openmmlab.config_errors import build

    with pytest.raises(UserError, match=r"Set train_dataloader\.batch_size=2 or more"):
        build(Config(), lambda: torch.nn.BatchNorm2d(3)(torch.ones(1, 3, 1, 1)))


def test_pictures_of_one_name_in_two_folders_are_both_drawn(detector, scenes, tmp_path):
    from mmengine.visualization import Visualizer

    Visualizer._instance_dict.clear()  # mmengine draws with the last one made, be it that of a segmentor
    content = json.loads((scenes / "detection/validation.json").read_text())
    for number, image in enumerate(content["images"]):
        name = f"{'ab'[number % 2]}/{number // 2}.png"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes / "images/validation" / image["file_name"], tmp_path / "images" / name)
        image["file_name"] = name
    (tmp_path / "v.json").write_text(json.dumps(content))
    data = {"root": str(tmp_path), **{s: {"images": "images", "annotations": "v.json"} for s in ("train", "val")}}
    (tmp_path / "data.yaml").write_text(json.dumps(data))
    flags = ["--checkpoint", str(detector / "epoch_1.pth"), "--work-dir", str(tmp_path / "w"), "--show-dir"]
    flags += [str(tmp_path / "show"), "--dataset", str(tmp_path / "data.yaml"), "--cfg-options", *DET_FEW]
    assert run_tool("eval", str(DETECTION), *flags) == 0
    drawn = {str(path.relative_to(tmp_path / "show")) for path in (tmp_path / "show").rglob("*.png")}
    assert drawn == {"a/0.png", "a/1.png", "b/0.png", "b/1.png"}


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)], ids=lambda number: number.name
)
def test_a_signal_ends_training_with_a_checkpoint_and_its_loading_processes(number, scenes, tmp_path):
    options = [*DET_FEW, "train_dataloader.num_workers=2", "train_cfg.max_epochs=1000", "train_cfg.val_interval=1000"]
    run = Child(tmp_path / "log", "train", str(DETECTION), "--work-dir", str(tmp_path), "--cfg-options", *options)
    run.wait_for(lambda: "Epoch(train)" in run.log.read_text() if run.log.exists() else False)
    code, said = run.stop(number, to="children")  # as Slurm and systemd do
    assert code == 128 + number, said[-2000:]
    (saved,) = tmp_path.glob("stopped_iter_*.pth")
    message = f"stopped by {number.name}; saved {saved}; training continues from it by --resume"
    assert said.splitlines()[-1] == message and "Traceback" not in said
    assert (tmp_path / "last_checkpoint").read_text() == str(saved)


@pytest.mark.parametrize(
    ("step", "count", "steps"),
    [
        ("train_step", 3, 1),  # the first of the two steps of the second epoch
        # the last one: the epoch ends when the training continues
        pytest.param("train_step", 4, 0, marks=pytest.mark.full),
        pytest.param("val_step", 2, 0, marks=pytest.mark.full),  # the first was the trial
    ],
)
def test_a_stopped_training_goes_on_where_it_was(step, count, steps, scenes, tmp_path, monkeypatch):
    from mmdet.models import MaskRCNN

    (tmp_path / "config.py").write_text(f"_base_ = {str(DETECTION)!r}\ncustom_hooks = [dict(type='EMAHook')]\n")
    options = [*DET_FEW, "train_cfg.max_epochs=2", "train_cfg.val_interval=2", "val_dataloader.batch_size=2"]
    argv = [str(tmp_path / "config.py"), "--work-dir", str(tmp_path / "run"), "--seed", "0", "--resume"]
    calls = {"train_step": [], "val_step": []}

    def counted(name, function):
        def call(self, data, **more):
            calls[name].append([sample.img_id for sample in data["data_samples"]])
            if name == step and len(calls[name]) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(self, data, **more)

        return call

    for name in calls:
        monkeypatch.setattr(MaskRCNN, name, counted(name, getattr(MaskRCNN, name)))
    assert run_tool("train", *argv, "--cfg-options", *options) == 128 + signal.SIGTERM
    state = torch.load(next((tmp_path / "run").glob("stopped_iter_*.pth")), weights_only=False)
    before = {name: list(numbers) for name, numbers in calls.items()}
    assert run_tool("train", *argv, "--cfg-options", *options) == 0
    trained = calls["train_step"]
    assert len(trained) == count + steps if step == "train_step" else len(trained) == 4
    assert sorted(chain(*trained[2:4])) == sorted(chain(*trained[:2]))  # each image once in the second epoch too
    assert len(calls["val_step"]) - len(before["val_step"]) == 1 + 2  # the trial, and the whole validation
    last = torch.load(tmp_path / "run/epoch_2.pth", weights_only=False)
    assert (last["meta"]["epoch"], last["meta"]["iter"]) == (2, 4)
    if not steps:  # nothing was left to learn
        for part in ("state_dict", "ema_state_dict"):
            for name, value in state[part].items():
                assert torch.equal(value, last[part][name]), (part, name)


def cut_short(folder):
    truncate(folder / "images/train/0002.png")


def smaller_image(folder):
    Image.new("RGB", (64, 96)).save(folder / "images/train/0002.png")


def smaller_mask(folder):
    Image.new("L", (64, 96), 1).save(folder / "annotations/train/0002.png")


def other_number(folder):
    Image.new("L", (128, 128), 77).save(folder / "annotations/train/0002.png")


def read_few_masks(monkeypatch):
    """Let the check before the first step read others than the one that is spoiled."""
    monkeypatch.setattr("visionzoo.openmmlab.masks.MASKS_READ", 1)
    monkeypatch.setattr("visionzoo.openmmlab.masks.MASKS_SEARCHED", 0)


def sixteen_bits(folder):
    Image.fromarray(np.full((128, 128), 259, np.uint16)).save(folder / "annotations/train/0002.png")  # 3 in 8 bits


@pytest.mark.parametrize(
    ("config", "spoil", "workers", "message"),
    [
        (
            SEGMENTATION,
            sixteen_bits,
            0,
            "annotations/train/0002.png: the mask has the labels 259, mmseg reads only masks of",
        ),
        (DETECTION, cut_short, 1, "images/train/0002.png: "),
        (
            DETECTION,
            smaller_image,
            0,
            "images/train/0002.png: it has a height of 96 and a width of 64 pixels, by its",
        ),
        (SEGMENTATION, cut_short, 1, "images/train/0002.png: "),
        (
            SEGMENTATION,
            smaller_mask,
            0,
            "annotations/train/0002.png: the mask has the shape (96, 64), its image a height",
        ),
        (
            SEGMENTATION,
            other_number,
            0,
            "annotations/train/0002.png: the mask has the class numbers [76] of 11 classes",
        ),
    ],
)
def test_a_bad_file_stops_training_by_name(config, spoil, workers, message, scenes, tmp_path, capsys, monkeypatch):
    shutil.copytree(scenes, tmp_path / "data")
    spoil(tmp_path / "data")
    read_few_masks(monkeypatch)
    options = [*(DET_FEW if config is DETECTION else SEG_FEW), f"train_dataloader.num_workers={workers}"]
    if config is SEGMENTATION:
        options += ["train_cfg.max_iters=4", "train_cfg.val_interval=4"]
    flags = ["--work-dir", str(tmp_path / "run"), "--data-root", str(tmp_path / "data"), "--cfg-options", *options]
    assert run_tool("train", str(config), *flags) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: cannot use {tmp_path / 'data'}/{message}") and "by --resume" in said


@pytest.mark.parametrize(
    ("config", "spoil", "workers"),
    [
        pytest.param(DETECTION, cut_short, 1, marks=pytest.mark.full),
        (DETECTION, smaller_image, 0),
        (SEGMENTATION, other_number, 1),
    ],
)
def test_bad_files_are_passed_over_and_named_with_skip_bad_images(
    config, spoil, workers, scenes, tmp_path, capsys, monkeypatch
):
    shutil.copytree(scenes, tmp_path / "data")
    spoil(tmp_path / "data")
    read_few_masks(monkeypatch)
    options = [*(DET_FEW if config is DETECTION else SEG_FEW), f"train_dataloader.num_workers={workers}"]
    if config is SEGMENTATION:
        options += ["train_cfg.max_iters=4", "train_cfg.val_interval=4"]
    flags = ["--work-dir", str(tmp_path / "run"), "--data-root", str(tmp_path / "data"), "--skip-bad-images"]
    assert run_tool("train", str(config), *flags, "--cfg-options", *options) == 0
    (log,) = (tmp_path / "run").rglob("2*.log")
    bad = tmp_path / "data/images/train/0002.png"
    assert f"WARNING - 1 training image was skipped: {bad}\n" in log.read_text()
    shutil.copy(bad, tmp_path / "data/images/validation/0001.png")
    shutil.copy(tmp_path / "data/annotations/train/0002.png", tmp_path / "data/annotations/validation/0001.png")
    assert run_tool("train", str(config), *flags, "--cfg-options", *options) == 1  # numbers of fewer images mislead
    assert "validation/0001.png" in capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_files_alone_stop_training_with_skip_bad_images(scenes, tmp_path, capsys):
    shutil.copytree(scenes, tmp_path / "data")
    for path in (tmp_path / "data/images/train").iterdir():
        truncate(path)
    flags = ["--work-dir", str(tmp_path / "run"), "--data-root", str(tmp_path / "data"), "--skip-bad-images"]
    assert run_tool("train", str(DETECTION), *flags, "--cfg-options", *DET_FEW) == 1
    assert "error: cannot use " in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_one_detector(scenes, tmp_path):
    """Without looking for unused parameters: there are none. The first says which image the other skipped."""
    shutil.copytree(scenes, tmp_path / "data")
    bad = [tmp_path / "data/images/train" / name for name in ("0001.png", "0002.png")]  # processes take every second
    for path in bad:
        truncate(path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools/train.py"), str(DETECTION), "--work-dir", str(tmp_path), "--seed", "0"]
    command += ["--data-root", str(tmp_path / "data"), "--skip-bad-images"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--cfg-options", *DET_FEW],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (tmp_path / "epoch_1.pth").exists()
    (log,) = Path(tmp_path).glob("2*/*.log")
    assert f"WARNING - 2 training images were skipped: {bad[0]}, {bad[1]}\n" in log.read_text()


def test_no_trainings_at_once_are_refused_before_the_data_are_looked_at(monkeypatch, capsys):
    from visionzoo.commands import overfit

    monkeypatch.setattr(sys, "argv", ["overfit", "--coco", "x", "--masks", "x", "--jobs", "0"])
    with pytest.raises(SystemExit):
        overfit.main()
    assert "argument --jobs: expected a number at least 1, got 0" in capsys.readouterr().err
