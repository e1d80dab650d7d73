"""RelationNet++: the relation module, and the whole dense head on RetinaNet's, narrow and on small maps."""

from __future__ import annotations

import importlib
import sys
import types
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from . import Recipe, Source, drawn
from .gates import normal, some

try:
    from mmcv.cnn import ConvModule
except ImportError:  # needed only where records are made
    ConvModule = None

RELATION_NET = Source("https://github.com/microsoft/RelationNet2", "093075267dd79c2019955aac958a96563302f825", "MIT")
CLASSES, CHANNELS, STRIDES, SIZES = 5, 32, (8, 16, 32), ((6, 7), (3, 4), (2, 2))
NORM = {"type": "GN", "num_groups": 8}
EPS = torch.finfo(torch.float32).eps  # what mmdet adds to the number by which a loss is divided


class _Registry:
    """A registry that registers nothing."""

    @staticmethod
    def register_module():
        return lambda kind: kind


def multi_apply(function, *args, **kwargs):
    """Return mmdet's: a list of each output."""
    return tuple(map(list, zip(*map(partial(function, **kwargs), *args), strict=True)))


class RetinaHead(nn.Module):
    """The layers of mmdet's."""

    def __init__(self, anchors=2):
        super().__init__()
        self.feat_channels = CHANNELS
        self.cls_convs, self.reg_convs = (
            nn.ModuleList([ConvModule(CHANNELS, CHANNELS, 3, padding=1, norm_cfg=NORM)]) for _ in range(2)
        )
        self.retina_cls = nn.Conv2d(CHANNELS, anchors * CLASSES, 3, padding=1)
        self.retina_reg = nn.Conv2d(CHANNELS, anchors * 4, 3, padding=1)


class AnchorFreeHead(nn.Module):
    """What the key points' head takes from mmdet's."""

    def __init__(self, num_classes, in_channels, stacked_convs, norm_cfg):
        super().__init__()
        self.num_classes, self.in_channels, self.feat_channels = num_classes, in_channels, CHANNELS
        self.stacked_convs, self.conv_cfg, self.norm_cfg, self.strides = stacked_convs, None, norm_cfg, STRIDES
        self.train_cfg, self.loss_cls = SimpleNamespace(assigner=None), focal
        self._init_layers()

    def _get_points_single(self, size, stride, dtype, device, flatten):
        rows, columns = torch.meshgrid(*(torch.arange(n, dtype=dtype) for n in size), indexing="ij")
        return rows.flatten(), columns.flatten()


class CornerPool(nn.Module):
    """mmcv's."""

    def __init__(self, side):
        super().__init__()
        self.axis, self.flip = {"bottom": (2, False), "left": (3, True), "right": (3, False), "top": (2, True)}[side]

    def forward(self, x):
        """Take the maximum so far."""
        x = x.flip(self.axis) if self.flip else x
        found = x.cummax(self.axis).values
        return found.flip(self.axis) if self.flip else found


def focal(predicted, target, avg_factor):
    """Return mmdet's GaussianFocalLoss of weight 1/4."""
    positive = -(predicted + 1e-12).log() * (1 - predicted) ** 2 * (target == 1)
    negative = -(1 - predicted + 1e-12).log() * predicted**2 * (1 - target) ** 4
    return 0.25 * (positive + negative).sum() / (avg_factor + EPS)


def smooth(predicted, target, weight, avg_factor):
    """Return mmdet's SmoothL1Loss."""
    return (F.smooth_l1_loss(predicted, target, reduction="none") * weight).sum() / (avg_factor + EPS)


STAND_INS = {
    "mmcv.runner": {"force_fp32": lambda **_: lambda function: function},
    "mmcv.runner.hooks.logger": {},
    "mmcv.cnn": {
        "ConvModule": ConvModule,
        "Linear": nn.Linear,
        "normal_init": lambda module, std: nn.init.normal_(module.weight, std=std),
    },
    "mmcv.ops": {"CornerPool": CornerPool},
    "mmdet.core": {
        "multi_apply": multi_apply,
        "build_sampler": lambda *_, **__: None,
        "build_assigner": lambda _: None,
    },
    "mmdet.models.utils.bvr_utils": {},
    "mmdet.models.utils.bvr_transformer": {},
    "mmdet.models.dense_heads": {
        "AnchorFreeHead": type("Other", (), {}),
        "FCOSHead": type("Other", (), {}),
        "ATSSHead": type("Other", (), {}),
        "RetinaHead": RetinaHead,
    },
    "mmdet.ops.corner_pool": {},
    "models.builder": {"HEADS": _Registry, "build_loss": lambda _: smooth, "build_head": lambda built: built},
    "models.utils.builder": {"TRANSFORMER": _Registry},
    "models.utils.bvr_transformer.builder": {"BVR_ATTENTION": _Registry, "BVR_POSITIONAL_ENCODING": _Registry},
    "models.dense_heads.base_dense_head": {"BaseDenseHead": nn.Module},
    "models.dense_heads.dense_test_mixins": {"BBoxTestMixin": type("BBoxTestMixin", (), {})},
    "models.dense_heads.anchor_free_head": {"AnchorFreeHead": AnchorFreeHead},
    "core.bbox.builder": {"BBOX_ASSIGNERS": _Registry},
    "core.bbox.assigners.base_assigner": {"BaseAssigner": object},
    "core.bbox.assigners.assign_result": {},
}


def authors(module, name):
    """Import another module of the clone, whose packages are taken as empty."""
    root = Path(module.__file__).parents[2]
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = ".".join(parts[:i])
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(root.joinpath(*parts[:i]))]
    return importlib.import_module(name)


@contextmanager
def exact():
    """Let sines be computed in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def head(module, keypoints, **options):
    """Build the dense head, with the sines of its tables in float64."""
    corners = authors(module, "ops.corner_pool")
    keypoint_module = authors(module, "models.dense_heads.keypoint_head")
    keypoint_module.TLPool, keypoint_module.BRPool = corners.TLPool, corners.BRPool
    module.SimpleBVR_Transformer = authors(module, "models.utils.bvr_transformer.transformer").SimpleBVR_Transformer
    module.assign_required_method = authors(module, "models.utils.bvr_utils").assign_required_method
    built = keypoint_module.KeypointHead(CLASSES, CHANNELS, norm_cfg=NORM, **keypoints)
    built.point_assigner = authors(module, "core.bbox.assigners.point_kpt_assigner").PointKptAssigner()
    with exact():
        return module.BVRHead(RetinaHead(), built, num_attn_heads=4, **options)


def levels() -> list[torch.Tensor]:
    """Draw the levels of a pyramid."""
    return [drawn(i, (2, CHANNELS, *size)) for i, size in enumerate(SIZES)]


def objects() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return boxes and classes of two images."""
    boxes = torch.tensor([[3.0, 5, 30, 41], [20, 8, 27, 19], [1, 30, 50, 46]]).double()
    return [(boxes, torch.tensor([0, 3, 4])), (boxes[1:] + 2, torch.tensor([2, 2]))]


def predicted(model: nn.Module, _: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the maps of classes and boxes, the losses of the key points, and gradients of all."""
    model.train()
    maps = [x.requires_grad_() for x in levels()]
    with exact():
        outs, scores, offsets = model(maps)
    boxes, labels = (list(part) for part in zip(*objects(), strict=True))
    losses = model.keypoint_head.loss_multihead(scores, offsets, boxes, labels, [{}] * 2)
    found = {f"{kind}{i}": out for kind, each in zip(("cls", "box"), outs, strict=True) for i, out in enumerate(each)}
    total = sum((out * normal(4, out.shape)).sum() for out in found.values()) + sum(losses.values())
    used = {f"grad_{i}": x for i, x in enumerate(maps)} | {f"grad/{n}": p for n, p in model.named_parameters()}
    grads = torch.autograd.grad(total, list(used.values()))
    found |= {name: some(grad, 64) for name, grad in zip(used, grads, strict=True)}
    return {key: some(value) for key, value in found.items()} | losses


def recipe(keypoints, **options):
    """Return the recipe of a dense head."""
    return Recipe(
        RELATION_NET,
        "models/dense_heads/bvr_head.py",
        head,
        {"keypoints": keypoints, **options},
        root="code",
        image=(2, CHANNELS, *SIZES[0]),
        run=predicted,
        gradients=True,
        constants=("base_embedding",),
        stand_ins=STAND_INS,
        notes="levels and objects are those of recipes.bvr, in place of the image; gradients are of the sum of all "
        "maps times RandomState(4).standard_normal(their shape), and of the losses. Layers and losses of mmdet and "
        "mmcv are those of mmdet 3.5.1 and mmcv 2.3.6",
    )


RELATION = {"with_key_score": False, "with_relation": True}
CENTERS = {"keypoint_types": ["center"], **RELATION}
CORNERS = {"keypoint_types": ["top_left_corner", "bottom_right_corner"], **RELATION}
KINDS = {"cls_keypoint_cfg": CENTERS, "reg_keypoint_cfg": CORNERS}
RECIPES = {
    "retinanet": recipe(
        {"stacked_convs": 2, "logits_convs": 1},
        **KINDS,
        keypoint_cfg={"max_keypoint_num": 6, "keypoint_score_thr": 0.0},
        feature_selection_cfg={"selection_method": "index", "cross_level_topk": 10, "cross_level_selection": True},
        scale_position=False,
        pos_cfg={"base_size": [20, 14], "log_scale": True},
    ),
    "other_options": recipe(
        {"stacked_convs": 1, "shared_stacked_convs": 1, "corner_pooling": True},
        **KINDS,
        keypoint_pos="cls",
        keypoint_cfg={"max_keypoint_num": 5, "block_grad": True},
        feature_selection_cfg={"selection_method": "interpolation", "cross_level_topk": 8},
        shared_positional_encoding_inter=False,
        reg_cat_pos=True,
        scale_position=True,
        scale_factor=0.5,
        pos_cfg={"base_size": [21, 15]},
    ),
    "own_levels": recipe(
        {"stacked_convs": 1},
        **KINDS,
        keypoint_pos="reg",
        keypoint_cfg={"max_keypoint_num": 5},
        feature_selection_cfg={"selection_method": "index"},
        shared_positional_encoding_outer=True,
        with_appearance_relation=False,
        pos_cfg={"base_size": None},
    ),
}
