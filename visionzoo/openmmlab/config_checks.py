"""What has to fit together in a config of a detector or segmentor, checked before anything is built."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from visionzoo.engine.errors import UserError
from visionzoo.openmmlab.backbone import feature_channels
from visionzoo.text import count_of


def check_channels(cfg: Config) -> None:
    """Compare the channels that neck or head expect with those of the backbone.

    Raises:
        UserError: if they differ; with both lists.
    """
    backbone: Any = cfg.model.get("backbone") or {}
    if backbone.get("type") != "ZooBackbone":
        return
    options = {key: value for key, value in backbone.items() if key not in _NOT_OF_THE_MODEL}
    channels = feature_channels(backbone.name, backbone.get("out_indices"), **options)
    place = "neck" if cfg.model.get("neck") else "decode_head"
    expected = cfg.model.get(place, {}).get("in_channels", channels)
    if isinstance(expected, list | tuple) and list(expected) != channels:
        raise UserError(
            f"model.{place}.in_channels is {list(expected)}, the maps of {backbone.name} have {channels}. In a config: "
            f"in_channels=feature_channels({backbone.name!r}) of visionzoo.openmmlab."
        )


def check_windows(cfg: Config) -> None:
    """Check that the windows of a segmentor that slides over its pictures leave no pixel out.

    Raises:
        UserError: their size or steps are no pairs of positive whole numbers, or a step is longer than a window.
    """
    test_cfg = cfg.model.get("test_cfg") or {}
    if test_cfg.get("mode") != "slide":
        return
    for name in ("crop_size", "stride"):
        pair = test_cfg.get(name)
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)):
            raise UserError(
                f"expected model.test_cfg.{name} as two positive whole numbers, height and width, for mode='slide', "
                f"got {pair!r}"
            )
    crop, stride = test_cfg["crop_size"], test_cfg["stride"]
    if any(step > side for step, side in zip(stride, crop, strict=True)):
        raise UserError(
            f"model.test_cfg: steps of {tuple(stride)} leave pixels out between windows of {tuple(crop)} (height, "
            f"width); set stride to at most crop_size"
        )


def check_boxes(cfg: Config) -> None:
    """Check that a detector with queries, such as Focus-DETR and ViDT, makes as many boxes as its results shall have.

    Raises:
        UserError: `max_per_img` is no positive whole number, or there are fewer boxes.
    """
    model: Any = cfg.model
    backbone: Any = model.get("backbone") or {}
    head: Any = model.get("bbox_head") or {}
    tokens = backbone.get("num_tokens", 100 if backbone.get("type") == "DetectionTokenBackbone" else None)
    queries, classes = model.get("num_queries", tokens), head.get("num_classes")
    most = (model.get("test_cfg") or {}).get("max_per_img")
    if most is None or not type(queries) is type(classes) is int or "language_model" in model:
        return  # with a language model the classes are those of the text
    pairs = (head.get("loss_cls") or {}).get("use_sigmoid")
    boxes = queries * classes if pairs else queries
    if type(most) is not int or not 1 <= most <= boxes:
        of_them = f"{count_of(queries, 'query', 'queries')} and {count_of(classes, 'class')}"
        place = "num_queries" if "num_queries" in model else "backbone.num_tokens"
        raise UserError(
            f"model.test_cfg.max_per_img: expected a whole number from 1 to {boxes}, the boxes that "
            f"{of_them if pairs else count_of(queries, 'query', 'queries')} can make, got {most!r}; set it lower, or "
            f"model.{place} higher"
        )


_NOT_OF_THE_MODEL = (
    "type", "_scope_", "name", "out_indices", "out_norm", "frozen_stages", "norm_eval", "drop_path_rate", "with_cp",
    "pretrained", "init_cfg",
)  # fmt: skip
