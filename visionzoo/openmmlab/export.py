"""Detectors and segmentors as files: what the network puts out, before NMS, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from visionzoo.deploy.exporting import Exported
from visionzoo.deploy.files import check_flags, shape_of, write_files
from visionzoo.engine.errors import UserError
from visionzoo.engine.parallel import start_process
from visionzoo.openmmlab.config_checks import check_channels
from visionzoo.openmmlab.config_errors import merge_options
from visionzoo.openmmlab.configuring import config_classes
from visionzoo.openmmlab.flags import ExportConfig
from visionzoo.openmmlab.meta import checkpoint_classes, compare_model
from visionzoo.openmmlab.running import read_config, require_checkpoint, say_notes


class RawDetector(nn.Module):
    """A RetinaNet up to its head: class scores of all levels, then box deltas of all levels."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] to logits [B, A·K, h, w] and deltas [B, A·4, h, w] of A anchors and K classes."""
        scores, deltas = self.detector._forward(images)  # type: ignore[operator]
        return (*scores, *deltas)


class RawSegmentor(nn.Module):
    """A segmentor up to its head."""

    def __init__(self, segmentor: nn.Module):
        super().__init__()
        self.segmentor = segmentor

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, K, H / stride, W / stride]."""
        return self.segmentor._forward(images)  # type: ignore[operator]


def export_dense(config: ExportConfig) -> list[Exported]:
    """Export what the flags name; write the files with NAME.json beside them, and return them.

    Raises:
        UserError: config and checkpoint do not fit, or the network is none that has raw outputs.
    """
    check_flags(config.files)
    if bool(config.checkpoint) == config.random_weights:
        raise UserError("which weights? give --checkpoint, or --random-weights to measure speed")
    cfg = read_config(config.config)
    if config.cfg_options:
        merge_options(cfg, config.cfg_options)
    describe = _describer(cfg.model)
    if config.checkpoint:
        require_checkpoint(config.checkpoint)
    cfg.model.backbone.pretrained = False  # the checkpoint has all weights
    check_channels(cfg)
    device = start_process(config.files.device).device
    init_default_scope(cfg.default_scope)
    network = revert_sync_batchnorm(MODELS.build(cfg.model))
    content: Mapping[str, Any] = {}
    if config.checkpoint:
        try:
            content = load_checkpoint(network, config.checkpoint, map_location="cpu", strict=True)
        except RuntimeError as error:
            raise UserError(f"{config.checkpoint} does not fit {config.config}: {error}") from error
        say_notes(compare_model(content, cfg, config.checkpoint))
    network = network.to(device).eval()
    shape = shape_of(config.files, _input_size(config, cfg))
    description = {
        "model": Path(config.config).stem,
        "preprocessing": _preprocessing(cfg.model.data_preprocessor),
        **describe(network),
        "class_names": checkpoint_classes(content) or config_classes(cfg),
    }
    raw = RawDetector(network) if description["task"] == "detection" else RawSegmentor(network)
    return write_files(raw, Path(config.files.output) / Path(config.config).stem, shape, description, config.files)


def _describer(model: Mapping[str, Any]) -> Any:
    if model["type"] == "RetinaNet":
        return _describe_detector
    if model["type"] == "EncoderDecoder" and not model["decode_head"]["type"].endswith("Mask2FormerHead"):
        return _describe_segmentor
    head = model.get("decode_head", {}).get("type")
    raise UserError(
        f"{model['type']}{f' with {head}' if head else ''} has no raw outputs to export: its network chooses boxes or "
        f"masks as it goes. Configs of RetinaNet (configs/detection/retinanet_*) and of segmentors whose head gives "
        f"logits (configs/segmentation/semantic-fpn_*, upernet_*) have"
    )


def _describe_detector(detector: Any) -> dict[str, Any]:
    head, anchors = detector.bbox_head, detector.bbox_head.prior_generator
    strides = [list(stride) for stride in anchors.strides]
    boxes = [level.tolist() for level in anchors.base_anchors]
    return {
        "task": "detection",
        "outputs": [
            *({"name": f"scores_{level}", "level": level} for level in range(len(strides))),
            *({"name": f"deltas_{level}", "level": level} for level in range(len(strides))),
        ],
        "activation": "sigmoid" if head.use_sigmoid_cls else "softmax",
        "channels": "scores: anchor · classes + class; deltas: anchor · 4 + (dx, dy, dw, dh)",
        "levels": [
            {"stride": [stride[1], stride[0]], "anchors": anchor}  # mmdet's are (horizontal, vertical)
            for stride, anchor in zip(strides, boxes, strict=True)
        ],
        "anchors": "x1, y1, x2, y2 in pixels of the input at row 0, column 0; stride (vertical, horizontal) further on",
        "box_coder": {
            "means": list(head.bbox_coder.means),
            "stds": list(head.bbox_coder.stds),
            "wh_ratio_clip": 16 / 1000,  # mmdet's DeltaXYWHBBoxCoder.decode
            "decode": "d = delta · std + mean; center = anchor center + d_xy · anchor size; size = anchor size · "
            "exp(clip(d_wh, ± |log wh_ratio_clip|))",
        },
        "test_cfg": detector.test_cfg.to_dict(),
    }


def _describe_segmentor(segmentor: Any) -> dict[str, Any]:
    head = segmentor.decode_head
    resize = f"resize to the input bilinearly, align_corners={head.align_corners}, then "
    if head.out_channels == 1:
        return {
            "task": "segmentation",
            "outputs": [{"name": "logits"}],
            "activation": "sigmoid of one channel",
            "threshold": head.threshold,
            "decode": f"{resize}sigmoid; class 1 above the threshold, else class 0",
        }
    return {
        "task": "segmentation",
        "outputs": [{"name": "logits"}],
        "activation": "softmax over the channels",
        "decode": f"{resize}the largest channel",
    }


def _preprocessing(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mean": list(preprocessor.get("mean") or [0.0] * 3),
        "std": list(preprocessor.get("std") or [1.0] * 3),
        "channels": "RGB" if preprocessor.get("bgr_to_rgb") else "BGR",
        "range": "pixels 0 to 255, subtract mean, divide by std",
        "pad_size_divisor": preprocessor.get("pad_size_divisor", 1),
    }


def _input_size(config: ExportConfig, cfg: Any) -> tuple[int, int, int]:
    """Return channels, height and width: the flags', else what the config tests at, padded as it says."""
    if config.input_size:
        channels, height, width = config.input_size
        return channels, height, width
    if config.img_size:
        return 3, config.img_size, config.img_size
    preprocessor = cfg.model.data_preprocessor
    if size := preprocessor.get("size"):  # of segmentors: (height, width)
        return 3, *size
    scales = [
        step["scale"] for step in cfg.test_dataloader.dataset.pipeline if step["type"] == "Resize" and "scale" in step
    ]
    if not scales:
        raise UserError("the config does not say how large its images are: give --img-size or --input-size")
    divisor = preprocessor.get("pad_size_divisor", 1)
    width, height = (-(-side // divisor) * divisor for side in scales[0])
    return 3, height, width
