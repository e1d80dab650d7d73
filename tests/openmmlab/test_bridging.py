"""RelationNet++'s dense head is the authors' function with its losses, on any image, and says what it cannot do."""

import re

import pytest
import torch
from golden import Record, relative_error
from recipes.bvr import CHANNELS, CLASSES, NORM, STRIDES, levels, objects
from recipes.gates import normal, some
from tape import Capture

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

from visionzoo.layers.bridging import BridgingAttention, RelativeLocation

RETINA = {
    "type": "RetinaHead",
    "num_classes": CLASSES,
    "in_channels": CHANNELS,
    "feat_channels": CHANNELS,
    "stacked_convs": 1,
    "norm_cfg": NORM,
    "anchor_generator": {
        "type": "AnchorGenerator",
        "octave_base_scale": 4,
        "scales_per_octave": 1,
        "ratios": [0.5, 2.0],
        "strides": list(STRIDES),
    },
}
KEYPOINTS = {
    "type": "BVRKeypointHead",
    "num_classes": CLASSES,
    "in_channels": CHANNELS,
    "feat_channels": CHANNELS,
    "strides": STRIDES,
    "norm_cfg": NORM,
}
FORMS = {
    "retinanet": (
        {"stacked_convs": 2, "logits_convs": 1},
        {"max_points": 6, "cross_level_topk": 10, "location": {"base_size": (20, 14), "log_scale": True}},
    ),
    "other_options": (
        {"stacked_convs": 1, "shared_stacked_convs": 1, "corner_pooling": True},
        {
            "keypoint_pos": "cls",
            "max_points": 5,
            "block_grad": True,
            "selection_method": "interpolation",
            "cross_level_topk": 8,
            "cross_level_selection": False,
            "shared_location": False,
            "reg_cat_offset": True,
            "scale_position": True,
            "scale_factor": 0.5,
            "location": {"base_size": (21, 15)},
        },
    ),
    "own_levels": (
        {"stacked_convs": 1},
        {
            "keypoint_pos": "reg",
            "max_points": 5,
            "cross_level_topk": 0,
            "shared_location_outer": True,
            "appearance": False,
            "scale_position": True,
            "location": {"base_size": None},
        },
    ),
}


def build(form="retinanet", bbox_head=RETINA, keypoint=(), **more):
    torch.manual_seed(0)
    init_default_scope("mmdet")
    keypoints, options = FORMS[form]
    parts = {"bbox_head_cfg": bbox_head, "keypoint_head_cfg": {**KEYPOINTS, **keypoints, **dict(keypoint)}}
    return MODELS.build({"type": "BVRHead", **parts, "num_attn_heads": 4, **options, **more})


@pytest.mark.parametrize("form", FORMS)
def test_outputs_losses_and_gradients_are_the_authors(form):
    record = Record(f"bvr/{form}")
    head = build(form).double()
    state = record.state_dict() | {name: torch.zeros(1) for name, _, kind in record.meta["state"] if kind == "const"}
    head.load_state_dict(state)  # by the authors' names, with their tables
    maps = [x.requires_grad_() for x in levels()]
    with Capture():  # a CUDA graph can hold it
        outs, scores, offsets = head._outputs(maps)
    own = {f"{kind}{i}": x for kind, each in zip(("cls", "box"), outs, strict=True) for i, x in enumerate(each)}
    total = sum((x * normal(4, x.shape)).sum() for x in own.values())
    images = [InstanceData(bboxes=boxes, labels=labels) for boxes, labels in objects()]
    losses = head.keypoint_head.loss(scores, offsets, images)
    (total + sum(losses.values())).backward()
    own |= losses | {f"grad_{i}": x.grad for i, x in enumerate(maps)}
    for key, expected in record.arrays.items():
        value = own[key] if key in own else head.get_parameter(key.removeprefix("grad/")).grad
        value = some(value.detach(), expected.size)
        if abs(expected).max() < 1e-13:  # a softmax does not feel it: rounding only
            assert value.abs().max() < 1e-13, key
        else:
            assert relative_error(value, expected.reshape(-1)) <= 1e-9, key
    assert len(record.arrays) > 50


def test_images_of_any_size_learn_also_without_objects():
    head = build()
    head.init_weights()
    for boxes in (torch.tensor([[4.0, 4, 30, 20]]), torch.zeros(0, 4)):
        maps = [torch.randn(1, CHANNELS, *size) for size in ((1, 5), (1, 3), (1, 1))]
        outs, scores, offsets = head._outputs(maps)
        losses = head.keypoint_head.loss(
            scores, offsets, [InstanceData(bboxes=boxes, labels=torch.zeros(len(boxes)).long())]
        )
        assert all(loss.isfinite() for loss in losses.values())
        (sum(losses.values()) + sum(x.sum() for each in outs for x in each)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


FCOS = {
    **{key: RETINA[key] for key in ("num_classes", "in_channels", "feat_channels", "stacked_convs")},
    "type": "FCOSHead",
    "strides": list(STRIDES),
    "regress_ranges": ((-1, 64), (64, 128), (128, 1e8)),
}
HEADS = {
    "retinanet": RETINA,
    "fcos": FCOS,
    "fcos_in_strides": {**FCOS, "norm_on_bbox": True, "centerness_on_reg": True},
    "atss": {**RETINA, "type": "ATSSHead"},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_without_key_points_the_predictions_are_the_heads_own(name, training):
    head = build(bbox_head=HEADS[name], cls_keypoint_types=(), reg_keypoint_types=()).train(training)
    for parameter in head.bbox_head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    maps = [x.float() for x in levels()]
    for ours, own in zip(head(maps), head.bbox_head(maps), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, own, strict=True))
    looking = build(bbox_head=HEADS[name]).train(training)
    looking.load_state_dict(head.state_dict(), strict=False)
    assert not any(torch.equal(x, y) for x, y in zip(looking(maps)[0], head(maps)[0], strict=True))


def test_the_table_is_that_of_all_offsets():
    torch.manual_seed(0)
    layer = RelativeLocation(8, 2, base_size=(6, 4), temperature=10.0).double()
    exact = RelativeLocation(8, 2, base_size=None, temperature=10.0).double()
    exact.load_state_dict(layer.state_dict())
    rows, columns = torch.meshgrid(torch.arange(-2, 3), torch.arange(-3, 4), indexing="ij")
    offsets = torch.stack([columns, rows], -1)[None].double()
    assert torch.allclose(layer.table(), exact(offsets), rtol=0, atol=1e-14)
    assert layer.table().std() > 1e-3
    log = RelativeLocation(8, 2, base_size=None, temperature=10.0, log_scale=True).double()
    log.load_state_dict(layer.state_dict())
    assert torch.equal(log(offsets), exact(offsets).clamp(min=1e-6).log())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_places_stay_exact_under_autocast(dtype):
    head = build()
    head.init_weights()
    maps = levels()
    with torch.autocast("cpu", dtype):
        _, scores, offsets = head._outputs([x.float() for x in maps])
        _, places, pixels = head.keypoint_head.best_points(scores, offsets, ["center"], 6)
    for xy, at, level, stride, moved in zip(
        places, pixels, head.keypoint_head.locations(maps), STRIDES, offsets["center"], strict=True
    ):
        own = moved.float().flatten(2).mT.gather(1, at[..., None].expand(-1, -1, 2)) * stride
        assert torch.equal(xy, level.float()[at] + own) and xy.dtype == torch.float32


WRONG = [
    ({"bbox_head": {**RETINA, "type": "RetinaSepBNHead", "num_ins": 3}}, "of ['RetinaHead', 'FCOSHead', 'ATSSHead']"),
    ({"cls_keypoint_types": ["middle"]}, "key points ['middle'] are not predicted"),
    ({"keypoint_pos": "output"}, "keypoint_pos must be 'input', 'cls' or 'reg', got keypoint_pos='output'"),
    ({"selection_method": "nearest"}, "got selection_method='nearest'"),
    ({"max_points": 0}, "got max_points=0"),
    ({"cross_level_selection": False}, "a level has no pixel for the points of another"),
    ({"keypoint": {"strides": (4, 8, 16)}}, "the same, got [8, 16, 32] and [4, 8, 16]"),
    ({"shared_location_outer": True, "shared_location": False}, "shared_location_outer needs"),
    ({"location": None, "appearance": False}, "points are compared by nothing"),
    ({"num_attn_heads": 5}, "num_heads must divide dim, got dim=32 and num_heads=5"),
    ({"location": {"base_size": (1, 5)}}, "2 or more, got base_size=(1, 5)"),
    ({"location": {"temperature": 0}}, "temperature must be positive"),
    ({"keypoint": {"head_types": ("center", "center")}}, "each once, got head_types=('center', 'center')"),
    ({"keypoint": {"gaussian_iou": 1.0}}, "between 0 and 1, got gaussian_iou=1.0"),
    ({"keypoint": {"num_classes": 0}}, "got num_classes=0"),
    (
        {"keypoint": {"stacked_convs": 0, "feat_channels": 16}},
        "feat_channels must be in_channels=32, got feat_channels=16",
    ),
    ({"keypoint": {"feat_channels": 40, "corner_pooling": True}}, "a multiple of 32 channels, got 40"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kinds": 0}, "one kind of key points or more, got num_kinds=0"),
        ({"dim": 6, "num_heads": 2}, "dim must be a positive multiple of 4, got dim=6"),
        (
            {"location_of": BridgingAttention(8, 2, num_kinds=2, shared_location=False)},
            "location_of must be a layer whose kinds share their location",
        ),
    ],
)
def test_wrong_options_of_the_attention_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BridgingAttention(**{"dim": 8, "num_heads": 2, **options})


def test_levels_without_their_kinds_of_points_are_named():
    layer = BridgingAttention(8, 2, num_kinds=2)
    pixels, points = torch.zeros(1, 2, 2, 8), torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="expected 2 kinds of points on each level, got 1"):
        layer([pixels], [torch.zeros(1, 2, 2, 2)], [[points]], [[torch.zeros(1, 3, 2)]])
