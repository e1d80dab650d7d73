"""One's own data in a config, and what stops a run before its first step."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmengine.config import Config

from visionzoo.data.layouts import check_folder
from visionzoo.engine import UserError
from visionzoo.openmmlab.data import check_data, datasets, heads, use_classes, use_dataset, use_root
from visionzoo.openmmlab.running import check_channels

CONFIGS = Path(__file__).parents[2] / "configs"
CASCADE = "detection/cascade-mask-rcnn_zoo-swin-t_fpn_ms-crop-3x_coco.py"
RETINANET = "detection/retinanet_zoo-davit-t_fpn_tiny.py"
UPERNET = "segmentation/upernet_zoo-davit-t_160k_ade20k-512x512.py"
MASK2FORMER = "segmentation/mask2former_zoo-davit-t_160k_ade20k-512x512.py"


def load(name):
    return Config.fromfile(str(CONFIGS / name))


@pytest.fixture
def pets(tmp_path):
    """Two images of cats and dogs, with boxes and masks; returns a function that writes their description."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / f"masks_{split}").mkdir()
        annotations = []
        for i in range(2):
            Image.fromarray(np.full((32, 48, 3), 40 * i, np.uint8)).save(tmp_path / split / f"{i}.jpg")
            Image.fromarray(np.full((32, 48), i, np.uint8)).save(tmp_path / f"masks_{split}" / f"{i}.png")
            annotations.append(
                {"id": i + 1, "image_id": i, "category_id": 5 + i, "bbox": [2, 3, 20, 20], "area": 400, "iscrowd": 0}
            )
        images = [{"id": i, "file_name": f"{i}.jpg", "height": 32, "width": 48} for i in range(2)]
        categories = [{"id": 5, "name": "dog"}, {"id": 6, "name": "cat"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))

    def describe(**changes):
        splits = {s: {"images": s, "annotations": f"{s}.json"} for s in ("train", "val")}
        (tmp_path / "pets.yaml").write_text(json.dumps({"root": ".", **splits, **changes}))
        return str(tmp_path / "pets.yaml")

    return describe


def masks(**changes):
    splits = {s: {"images": s, "masks": f"masks_{s}"} for s in ("train", "val")}
    return {**splits, "classes": ["soil", "crop"], **changes}


def test_a_description_sets_data_and_classes_everywhere(pets, tmp_path):
    cfg = load(CASCADE)
    use_dataset(cfg, pets())
    for loader, dataset in datasets(cfg):
        assert dataset.data_root == str(tmp_path) and dataset.metainfo.classes == ("dog", "cat")
        assert dataset.ann_file == ("train.json" if loader == "train_dataloader" else "val.json")
    assert [head.num_classes for head in heads(cfg)] == [2] * 4  # three box heads and the mask head
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == str(tmp_path / "val.json")
    assert check_data(cfg) == []


def test_a_description_of_masks_sets_data_and_classes_everywhere(pets, tmp_path):
    cfg = load(MASK2FORMER)
    use_dataset(cfg, pets(**masks(train={"images": "train", "masks": "masks_train"})))
    (head,) = heads(cfg)
    assert head.num_classes == 2 and head.loss_cls.class_weight == [1.0, 1.0, 0.1]
    for _, dataset in datasets(cfg):
        assert dataset.type == "BaseSegDataset" and not dataset.reduce_zero_label
        assert [t.reduce_zero_label for t in dataset.pipeline if t.type == "LoadAnnotations"] == [False]
    assert check_data(cfg) == []


def test_default_classes_on_other_annotations_stop_the_run_with_both_lists(pets, tmp_path):
    cfg = load(RETINANET)
    use_root(cfg, str(tmp_path))
    for _, dataset in datasets(cfg):
        dataset.update(ann_file="train.json", data_prefix={"img": "train"})
    with pytest.raises(UserError) as caught:
        check_data(cfg)
    said = str(caught.value)
    assert "78 of 80 classes are not among the annotated categories (person, bicycle" in said
    assert "classes of the config: person, bicycle" in said and "dog, cat" in said and "--classes" in said


def test_heads_with_another_number_of_classes_stop_the_run(pets):
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    cfg.model.bbox_head.num_classes = 80
    with pytest.raises(UserError, match="train_dataloader has 2 classes, RetinaHead num_classes=80: dog, cat"):
        check_data(cfg)


def test_classes_are_numbered_as_mmdet_does(pets):
    cfg = load(RETINANET)
    use_dataset(cfg, pets(classes=["cat", "dog"]))
    assert cfg.train_dataloader.dataset.dataset.metainfo.classes == ("dog", "cat")  # the annotation file's order
    for _, dataset in datasets(cfg):
        dataset.metainfo.classes = ("cat", "dog")
    with pytest.raises(UserError, match="in different order"):
        check_data(cfg)


def test_some_of_the_annotated_classes_may_be_taken(pets):
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    use_classes(cfg, ["cat"])
    assert cfg.model.bbox_head.num_classes == 1
    assert any("not used: dog" in note for note in check_data(cfg))
    use_classes(cfg, ["horse"])
    with pytest.raises(UserError, match=r"1 of 1 classes are not among the annotated categories \(horse\)"):
        check_data(cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["soil"]}, r"0.png|1.png has the values \[1\], but there are 1 classes"),
        ({"zero_is_unlabelled": True, "classes": ["a"]}, None),
        ({"mask_suffix": ".tif"}, r"2 masks are missing, the first is .*0\.tif"),
        ({"image_suffix": ".bmp"}, r"no images \*\.bmp in"),
        ({"classes": None}, r"expected classes: \[\.\.\.\], the names in the order"),
        ({"clases": ["a"]}, "unknown key 'clases' for segmentation; did you mean classes"),
        ({"val": {"images": "val"}}, "expected val: {images: PATH, masks: PATH} for segmentation, got"),
    ],
)
def test_masks_that_disagree_with_the_classes_stop_the_run(pets, change, message):
    def run():
        cfg = load(UPERNET)
        use_dataset(cfg, pets(**masks(**change)))
        check_data(cfg)

    if message is None:
        run()
    else:
        with pytest.raises(UserError, match=message):
            run()


def test_damaged_and_missing_annotations_are_named(pets, tmp_path):
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    for broken, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "is not in COCO's format"),
        ('{"images": [], "annotations": [{"id": 1}], "categories": []}', "lacks image_id"),
    ):
        (tmp_path / "val.json").write_text(broken)
        with pytest.raises(UserError, match=message):
            check_data(cfg)
    (tmp_path / "val.json").unlink()
    with pytest.raises(UserError, match="no annotations at"):
        check_data(cfg)


def test_missing_images_are_named(pets, tmp_path):
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    (tmp_path / "train/1.jpg").unlink()
    with pytest.raises(UserError, match=r"train_dataloader: 1 images are missing, the first is .*1\.jpg"):
        check_data(cfg)


def test_another_root_reaches_the_metric_too(tmp_path):
    cfg = load(RETINANET)
    use_root(cfg, "/elsewhere")
    assert cfg.val_evaluator.ann_file == "/elsewhere/annotations/instances_val2017.json"
    assert {dataset.data_root for _, dataset in datasets(cfg)} == {"/elsewhere"}


def test_channels_of_another_backbone_stop_the_run():
    cfg = load(RETINANET)
    check_channels(cfg)
    cfg.model.backbone.name = "zoo_biformer_t"
    with pytest.raises(
        UserError, match=r"neck.in_channels is \[192, 384, 768\], the maps of zoo_biformer_t have \[128"
    ):
        check_channels(cfg)


def test_a_folder_of_coco_is_checked(tmp_path, pets):
    found, missing = check_folder("coco", tmp_path)
    assert found == [] and any("train2017: not there" in line for line in missing) and len(missing) == 4
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    pets()
    (tmp_path / "annotations/instances_train2017.json").write_text((tmp_path / "train.json").read_text())
    _, missing = check_folder("coco", tmp_path)
    assert any("118287 of 118287 files are missing" in line for line in missing)
    assert any("2 of its images are not in train2017, such as 0.jpg" in line for line in missing)


def test_a_folder_of_ade20k_is_checked(tmp_path):
    for kind, name in (("images", "a.jpg"), ("images", "b.jpg"), ("annotations", "a.png")):
        folder = tmp_path / kind / "training"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    _, missing = check_folder("ade20k", tmp_path)
    assert "training: 1 images without mask, 0 masks without image" in missing
