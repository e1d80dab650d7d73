"""One's own data in a config, and what stops a run before its first step."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from engine.helpers import truncate
from PIL import Image

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmengine.config import Config

from visionzoo.data.layouts import check_folder
from visionzoo.engine import UserError
from visionzoo.openmmlab.config_checks import check_boxes, check_channels
from visionzoo.openmmlab.configuring import datasets, heads, use_classes, use_dataset, use_root
from visionzoo.openmmlab.data import check_data

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
            place = {"bbox": [2, 3, 20, 20], "area": 400, "segmentation": [[2, 3, 22, 3, 22, 23, 2, 23]]}
            annotations.append({"id": i + 1, "image_id": i, "category_id": 5 + i, "iscrowd": 0, **place})
        images = [{"id": i, "file_name": f"{i}.jpg", "height": 32, "width": 48} for i in range(2)]
        categories = [{"id": 5, "name": "dog"}, {"id": 6, "name": "cat"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))

    def describe(**changes):
        splits = {s: {"images": s, "annotations": f"{s}.json"} for s in ("train", "val")}
        (tmp_path / "pets.yaml").write_text(json.dumps({"root": ".", **splits, **changes}))
        return str(tmp_path / "pets.yaml")

    return describe


def notes(cfg):
    """What is said beside the summaries."""
    return [line for line in check_data(cfg) if not re.match(r"\w+: (\d+ of )?\d+ images?[,;]", line)]


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
    assert notes(cfg) == []


def test_a_description_of_masks_sets_data_and_classes_everywhere(pets, tmp_path):
    cfg = load(MASK2FORMER)
    use_dataset(cfg, pets(**masks(train={"images": "train", "masks": "masks_train"})))
    (head,) = heads(cfg)
    assert head.num_classes == 2 and head.loss_cls.class_weight == [1.0, 1.0, 0.1]
    for _, dataset in datasets(cfg):
        assert dataset.type == "BaseSegDataset" and not dataset.reduce_zero_label
        assert [t.reduce_zero_label for t in dataset.pipeline if t.type == "LoadAnnotations"] == [False]
    assert notes(cfg) == []


def test_default_classes_on_other_annotations_stop_the_run_with_both_lists(pets, tmp_path):
    cfg = load(RETINANET)
    use_root(cfg, str(tmp_path))
    for _, dataset in datasets(cfg):
        dataset.update(ann_file="train.json", data_prefix={"img": "train"})
    with pytest.raises(UserError) as caught:
        check_data(cfg)
    said = str(caught.value)
    assert "78 of 80 classes not among the annotated categories (person, bicycle" in said
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
    assert any(re.search("1 unused category in .*: dog", note) for note in notes(cfg))
    use_classes(cfg, ["horse"])
    with pytest.raises(UserError, match=r"1 of 1 class not among the annotated categories \(horse\)"):
        check_data(cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"classes": ["soil"]},
            r"png has the values \[1\], expected 0 to 0, and 255 for unlabeled: 1 class(?s:.*)zero_is_unlabeled: true",
        ),
        ({"zero_is_unlabeled": True, "classes": ["a", "b"]}, None),
        ({"zero_is_unlabelled": True, "classes": ["a", "b"]}, None),  # as it was spelt
        ({"mask_suffix": ".tif"}, r"missing: 2 masks, the first .*0\.tif"),
        (
            {"image_suffix": ".bmp"},
            r"no images \*\.bmp in .*; there are files \.jpg: name their ending by image_suffix",
        ),
        ({"classes": None}, r"expected classes: \[\.\.\.\], the names in the order"),
        ({"classes": "soil"}, "expected classes: .*, got 'soil'"),
        ({"classes": [True, False]}, "YAML reads yes, no, on and off as true and false"),
        ({"zero_is_unlabeled": "false"}, "expected zero_is_unlabeled: true or false, got 'false'"),
        ({"root": 5}, "expected root: TEXT, got 5"),
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


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=99), "annotation 1 is of category 99, which is not among"),
        (
            lambda c: c["annotations"][0].update(bbox=[2, float("nan"), 3, 3]),
            r"entry 1 of annotations has bbox='\[2, nan",
        ),
        (lambda c: c["annotations"][0].update(bbox=[2, 3, 20]), r"has bbox='\[2, 3, 20\]'.*expected \[x, y, width"),
        (lambda c: c["annotations"][1].update(id=1), "several annotations have the same id: 1"),
        (lambda c: c["images"][1].update(id=0), "several images have the same id: 0"),
        (lambda c: c["categories"].append({"id": 5, "name": "bird"}), "several categories have the same id: 5"),
        (lambda c: c["images"].append(3), "an entry of images has no keys: 3"),
        (lambda c: c.update(images=[]), "val.json lists no images"),
        (lambda c: c["annotations"][0].pop("iscrowd"), 'COCO\'s metric needs "iscrowd".*: 1'),
    ],
)
def test_annotations_that_cannot_be_used_are_named(pets, tmp_path, change, message):
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    edited(tmp_path / "val.json", change)
    with pytest.raises(UserError, match=message):
        check_data(cfg)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda c: c["annotations"][0].update(image_id=7), "1 annotation of images that it does not list in .*: 1"),
        (lambda c: c["annotations"][0].update(bbox=[2, 3, 0.5, 9]), "1 box of .* smaller than a pixel, .*: 1"),
        (lambda c: c["annotations"][1].update(bbox=[900, 3, 9, 9]), "1 box of .* outside of the image, .*: 2"),
        (lambda c: c["annotations"][1].update(area=0), '1 box of .*train.json with "area": 0 or less, .*: 2'),
        (
            lambda c: c["images"][1].update(file_name="0.jpg"),
            r"1 image of .* listed under several ids, .*: 0\.jpg",
        ),
        (
            lambda c: c["annotations"].append({**c["annotations"][1], "id": 9}),
            "1 annotation of .* equal to another.*: 9",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[20, 9, 40, 30]),
            "1 box of .* beyond their image by more than a pixel.*: 1",
        ),
    ],
)
def test_annotations_that_mmdet_leaves_out_are_counted(pets, tmp_path, change, note):
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    edited(tmp_path / "train.json", change)
    assert any(re.fullmatch(f"train_dataloader: {note}", said) for said in notes(cfg)), notes(cfg)


def test_a_detector_of_masks_needs_segmentations(pets, tmp_path):
    cfg = load(CASCADE)
    use_dataset(cfg, pets())
    edited(tmp_path / "train.json", lambda c: [a.pop("segmentation") for a in c["annotations"]])
    with pytest.raises(
        UserError, match=r"2 of 2 annotations of .* have no segmentation, and this detector learns masks: 1, 2"
    ):
        check_data(cfg)
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    assert notes(cfg) == []


def sixteen_bits(path):
    pixels = np.zeros((32, 48), np.uint16)
    pixels[:4], pixels[4:8] = 300, 256
    Image.fromarray(pixels).save(path)


def as_tiff(path, dtype, label):
    pixels = np.zeros((32, 48), dtype)
    pixels[4:8] = label
    Image.fromarray(pixels).save(path, format="TIFF")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("no image"), r"the mask .*0\.png cannot be read: cannot identify"),
        (truncate, r"the mask .*0\.png cannot be read: "),
        (lambda path: Image.new("RGB", (48, 32)).save(path), r"the mask .*0\.png has 3 channels \(RGB\)"),
        (sixteen_bits, r"the mask .*0\.png has the labels 256, 300, mmseg reads only masks of 8 bits \(256 as 0\)"),
        (lambda path: path.unlink(), r"missing: 1 mask, the first .*0\.png"),
        (lambda path: as_tiff(path, np.int32, -100), r"the mask .* has the labels -100, .* \(-100 as 156\)"),
        (lambda path: as_tiff(path, np.float32, np.nan), "the mask .* has the labels nan, mmseg reads only masks of 8"),
        (lambda path: as_tiff(path, np.float32, 0.5), r"the mask .* has the labels 0\.5, .* \(0\.5 as 0\)"),
    ],
)
def test_masks_that_cannot_be_used_are_named(pets, tmp_path, write, message):
    cfg = load(UPERNET)
    use_dataset(cfg, pets(**masks()))
    write(tmp_path / "masks_val/0.png")
    with pytest.raises(UserError, match=f"val_dataloader: {message}"):
        check_data(cfg)


def test_masks_without_a_class_stop_the_run_and_those_without_an_image_are_counted(pets, tmp_path):
    cfg = load(UPERNET)
    use_dataset(cfg, pets(**masks()))
    (tmp_path / "train/1.jpg").unlink()
    assert f"train_dataloader: 1 mask without an image in {tmp_path / 'train'}: 1.png" in notes(cfg)
    Image.new("L", (48, 32), 255).save(tmp_path / "masks_train/0.png")
    with pytest.raises(UserError, match=r"no pixel of 1 mask in .*masks_train has a class"):
        check_data(cfg)


def test_folders_in_folders_and_lists_of_images_are_read_as_mmseg_does(pets, tmp_path):
    cfg = load(UPERNET)
    use_dataset(cfg, pets(**masks()))
    for folder in ("train", "masks_train"):
        (tmp_path / folder / "town").mkdir()
        for file in list((tmp_path / folder).glob("*.*")):
            file.rename(file.parent / "town" / file.name)
    assert notes(cfg) == []
    (tmp_path / "listed.txt").write_text("1\n")
    (tmp_path / "masks_val/0.png").unlink()
    for loader, dataset in datasets(cfg):
        if loader != "train_dataloader":
            dataset.ann_file = "listed.txt"
    assert {note.partition(": ")[2] for note in notes(cfg)} == {"1 of 2 classes without a pixel in any mask: soil"}


def test_some_of_ade20ks_classes_may_be_taken_and_no_others(pets, tmp_path):
    cfg = load(UPERNET)
    use_root(cfg, str(tmp_path))
    for _, dataset in datasets(cfg):
        dataset.data_prefix = {"img_path": "train", "seg_map_path": "masks_train"}
    Image.new("L", (48, 32), 150).save(tmp_path / "masks_train/0.png")
    use_classes(cfg, ["wall", "flag"])  # the first and the last; mmseg gives them the numbers 0 and 1
    assert notes(cfg) == []
    use_classes(cfg, ["wall", "unicorn"])
    with pytest.raises(UserError, match=r"ADE20KDataset has classes of its own, .*\(unicorn\) need --dataset FILE"):
        check_data(cfg)


def test_weights_of_classes_go_with_their_number(pets):
    cfg = load("segmentation/semantic-fpn_zoo-biformer_digits.py")
    use_dataset(cfg, pets(**masks()))
    assert cfg.model.decode_head.loss_decode.class_weight == [1.0, 1.0]


def test_missing_images_are_named(pets, tmp_path):
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    (tmp_path / "train/1.jpg").unlink()
    with pytest.raises(UserError, match=r"train_dataloader: missing: 1 image, the first .*1\.jpg"):
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


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("focus-detr_zoo-davit-t_tiny.py", {}, None),
        (
            "focus-detr_zoo-davit-t_tiny.py",
            {"num_queries": 3, "bbox_head.num_classes": 2, "test_cfg.max_per_img": 7},
            "max_per_img: expected a whole number from 1 to 6, the boxes that 3 queries and 2 classes can make, got 7; "
            "set it lower, or model.num_queries higher",
        ),
        ("focus-detr_zoo-davit-t_tiny.py", {"test_cfg.max_per_img": 0}, "from 1 to 24000, "),
        ("focus-detr_zoo-davit-t_tiny.py", {"test_cfg.max_per_img": "x"}, "got 'x'"),
        ("vidt_zoo-swin-n_tiny.py", {}, None),
        ("vidt_zoo-swin-n_tiny.py", {"test_cfg.max_per_img": 8000}, None),
        (
            "vidt_zoo-swin-n_tiny.py",
            {"test_cfg.max_per_img": 8001},
            "the boxes that 100 queries and 80 classes can make, got 8001; set it lower, or model.backbone",
        ),
        (
            "vidt_zoo-swin-n_tiny.py",
            {"backbone.num_tokens": 1, "bbox_head.loss_cls.use_sigmoid": False, "test_cfg.max_per_img": 2},
            "from 1 to 1, the boxes that 1 query can make",
        ),
        ("retinanet_zoo-davit-t_fpn_tiny.py", {"test_cfg.max_per_img": 10**9}, None),
    ],
)
def test_more_boxes_than_queries_make_stop_the_run(config, options, message):
    cfg = load(f"detection/{config}")
    cfg.merge_from_dict({f"model.{key}": value for key, value in options.items()})
    if message is None:
        check_boxes(cfg)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            check_boxes(cfg)


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


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"images": [{"id": 1}]}'])
def test_a_folder_with_broken_annotations_is_checked_to_the_end(tmp_path, content):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(content)
    _, missing = check_folder("coco", tmp_path)
    assert any("instances_train2017.json: cannot be read as annotations of COCO" in line for line in missing)
    assert any("instances_val2017.json: not there" in line for line in missing)


def test_a_folder_of_ade20k_is_checked(tmp_path):
    for kind, name in (("images", "a.jpg"), ("images", "b.jpg"), ("annotations", "a.png")):
        folder = tmp_path / kind / "training"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    _, missing = check_folder("ade20k", tmp_path)
    assert "training: 1 image without mask, 0 masks without image" in missing


def test_each_split_is_summed_up(pets, tmp_path):
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    edited(tmp_path / "train.json", lambda c: c["annotations"].pop())
    lines = check_data(cfg)
    assert "train_dataloader: 1 of 2 images, 1 box: dog 1, cat 0" in lines
    assert "train_dataloader: 1 of 2 classes without a box, they are never learned: cat" in lines
    assert any("1 of 2 images left out: without an annotation of the classes (to learn" in line for line in lines)
    assert "val_dataloader: 2 of 2 images, 2 boxes: dog 1, cat 1" in lines
    cfg = load(UPERNET)
    use_dataset(cfg, pets(**masks()))
    assert "train_dataloader: 2 images; pixels of 2 masks: soil 50.0%, crop 50.0%, unlabeled 0.0%" in check_data(cfg)


def test_background_and_small_images_are_a_choice(pets, tmp_path):
    edited(tmp_path / "train.json", lambda c: c["annotations"].pop())
    for changes, used in (({}, 1), ({"background_images": True}, 2), ({"min_image_size": 40}, 0)):
        cfg = load(RETINANET)
        use_dataset(cfg, pets(**changes))
        if used:
            assert check_data(cfg)[0].startswith(f"train_dataloader: {used} of 2 images")
        else:
            with pytest.raises(UserError, match="smaller than 40 pixels"):
                check_data(cfg)
    for changes in ({"background_images": "yes"}, {"min_image_size": -1}):
        with pytest.raises(UserError, match=f"expected {next(iter(changes))}: "):
            use_dataset(load(RETINANET), pets(**changes))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"iscrowd": 1}, r"marked as crowds \(iscrowd: 1\)"),
        ({"ignore": 1}, "marked ignore: 1"),
        ({"area": 0}, '2 boxes of .*train.json with "area": 0 or less, from which nothing is learned: 1, 2'),
        ({"bbox": [100, 3, 4, 4]}, "outside of the image"),
    ],
)
def test_nothing_left_to_learn_from_stops_training(pets, tmp_path, change, reason):
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    edited(tmp_path / "train.json", lambda c: [a.update(change) for a in c["annotations"]])
    with pytest.raises(UserError, match=f"(?s)leaves nothing to learn from.*{reason}"):
        check_data(cfg)


@pytest.mark.parametrize(
    ("key", "field", "values"),
    [
        ("images", "width", ["48", None, 0, [48], 1.5]),
        ("images", "file_name", [3, None, ""]),
        ("images", "id", [None, [1]]),
        ("annotations", "iscrowd", ["0", None, 2, []]),
        ("annotations", "ignore", ["0", 3]),
        ("annotations", "area", ["400", None, float("inf")]),
        ("annotations", "bbox", ["2 3 20 20", None, {}]),
        ("annotations", "category_id", [None, [5]]),
        ("categories", "name", [5, None, ["dog"]]),
    ],
)
def test_every_field_has_its_type(pets, tmp_path, key, field, values):
    original = (tmp_path / "train.json").read_text()
    for value in values:
        cfg = load(RETINANET)
        (tmp_path / "train.json").write_text(original)
        edited(tmp_path / "train.json", lambda c, value=value: c[key][0].update({field: value}))
        with pytest.raises(UserError, match=rf"train\.json: the entry .* of {key} has {field}=.*; expected "):
            use_dataset(cfg, pets())


def test_evaluation_says_what_the_metric_counts(pets, tmp_path):
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    edited(tmp_path / "val.json", lambda c: c["annotations"][0].update(bbox=[900, 3, 9, 9]))
    (note,) = [line for line in notes(cfg) if line.startswith("val_dataloader")]
    assert "1 box of" in note and "outside of the image, which the metric counts as objects to be found" in note
    edited(tmp_path / "val.json", lambda c: [a.update(iscrowd=1) for a in c["annotations"]])
    with pytest.raises(UserError, match="leaves nothing to evaluate"):
        check_data(cfg)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            {"size": [16, 48], "counts": [0, 768]},
            r"of the size \[16, 48\] over 768 pixels; its image 0\.jpg has \[32, 48\]",
        ),
        ({"size": [32, 48], "counts": [0, 99]}, r"of the size \[32, 48\] over 99 pixels.*1536 pixels"),
    ],
)
def test_run_lengths_are_those_of_their_image(pets, tmp_path, mask, message):
    edited(tmp_path / "train.json", lambda c: c["annotations"][0].update(segmentation=mask))
    cfg = load(CASCADE)
    use_dataset(cfg, pets())
    with pytest.raises(UserError, match=message):
        check_data(cfg)
    whole = {"size": [32, 48], "counts": [0, 1536]}
    edited(tmp_path / "train.json", lambda c: c["annotations"][0].update(segmentation=whole))
    assert notes(cfg) == []


def test_names_with_backslashes_say_what_to_write(pets, tmp_path):
    edited(tmp_path / "val.json", lambda c: c["images"][0].update(file_name="..\\upload\\0.jpg"))
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    with pytest.raises(
        UserError, match=r"missing: 1 image.*write names with /, relative to the folder, such as 0\.jpg"
    ):
        check_data(cfg)


def test_polygons_are_checked_where_masks_are_read(pets, tmp_path):
    for split, polygon, message in (
        ("train", [2, 3, 22, 3], "expected a list of polygons"),
        ("val", [[2, 3, 22, 3]], "val_dataloader: 1 of 2 annotations .* fewer than three points.*cannot read it"),
        ("val", "x", "expected a list of polygons"),
    ):
        before = (tmp_path / f"{split}.json").read_text()
        edited(tmp_path / f"{split}.json", lambda c, p=polygon: c["annotations"][0].update(segmentation=p))
        cfg = load(CASCADE)
        use_dataset(cfg, pets())
        with pytest.raises(UserError, match=message):
            check_data(cfg)
        cfg = load(RETINANET)
        use_dataset(cfg, pets())
        assert notes(cfg) == []  # boxes alone
        (tmp_path / f"{split}.json").write_text(before)
    edited(tmp_path / "train.json", lambda c: c["annotations"][0]["segmentation"].append([1, 2]))
    cfg = load(CASCADE)
    use_dataset(cfg, pets())
    assert any("mmdet leaves these polygons out" in note for note in notes(cfg))


def test_two_categories_of_one_name_are_refused(pets, tmp_path):
    edited(tmp_path / "train.json", lambda c: c["categories"].append({"id": 9, "name": "cat"}))
    with pytest.raises(UserError, match="several categories have the same name: cat"):
        use_dataset(load(RETINANET), pets(classes=["dog", "cat"]))


def test_classes_without_a_pixel_are_named(pets, tmp_path):
    for i in range(2):
        Image.fromarray(np.full((32, 48), [0, 255][i], np.uint8)).save(tmp_path / f"masks_train/{i}.png")
    cfg = load(UPERNET)
    use_dataset(cfg, pets(**masks()))
    (note,) = notes(cfg)
    assert "1 of 2 classes without a pixel in any mask: crop; 255 is unlabeled, never a class" in note


def test_one_class_under_a_softmax_is_refused(pets, tmp_path):
    for split in ("train", "val"):
        Image.fromarray(np.zeros((32, 48), np.uint8)).save(tmp_path / f"masks_{split}/1.png")
    cfg = load("segmentation/semantic-fpn_zoo-biformer_digits.py")
    use_dataset(cfg, pets(**masks(classes=["crack"])))
    with pytest.raises(UserError, match="FPNHead has one class under a softmax"):
        check_data(cfg)
    assert check_data(cfg, ["test_dataloader"])
    cfg.model.decode_head.loss_decode.use_sigmoid = True
    assert check_data(cfg)


def test_images_that_opencv_turns_or_narrows_are_named(pets, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (48, 32)).save(tmp_path / "train/0.jpg", exif=exif)
    Image.fromarray(np.zeros((32, 48), np.uint16)).save(tmp_path / "train/1.jpg", format="PNG")
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    turned, deep = notes(cfg)
    assert "1 of 2 images opened with an EXIF orientation" in turned and "train/0.jpg" in turned
    assert "1 of 2 images opened with more than 8 bits" in deep and "train/1.jpg" in deep


def test_batches_of_two_sizes_are_refused_where_mmseg_cannot_stack_them(pets, tmp_path):
    Image.new("RGB", (48, 40)).save(tmp_path / "val/1.jpg")
    cfg = load(UPERNET)
    use_dataset(cfg, pets(**masks()))
    assert notes(cfg) == []
    cfg.val_dataloader.batch_size = 2
    with pytest.raises(UserError, match=r"val_dataloader: images have different sizes, such as \(48, 32\) and"):
        check_data(cfg)


def test_a_test_set_without_annotations_is_taken_with_format_only(pets, tmp_path):
    edited(tmp_path / "val.json", lambda c: c.pop("annotations"))
    cfg = load(RETINANET)
    use_dataset(cfg, pets())
    with pytest.raises(UserError, match="is not in COCO's format"):
        check_data(cfg, ["test_dataloader"])
    cfg.test_evaluator.update(format_only=True, outfile_prefix="x")
    assert check_data(cfg, ["test_dataloader"]) == ["test_dataloader: 2 images, without annotations"]
    cfg = load(UPERNET)
    use_dataset(cfg, pets(**masks(val={"images": "val", "masks": "nowhere"})))
    cfg.test_evaluator.update(format_only=True, output_dir="x")
    assert check_data(cfg, ["test_dataloader"]) == ["test_dataloader: 2 images, without masks"]
