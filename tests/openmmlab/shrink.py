"""Configs made small enough for a step on the CPU: few regions, queries and layers; the backbone stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmengine.config import Config
from mmengine.registry import init_default_scope

from visionzoo.openmmlab.configuring import heads

SIDE = 64  # pixels


def load_small(path: str) -> Config:
    cfg = Config.fromfile(path)
    model = cfg.model
    model.backbone.pretrained = False
    if "dilations" in model.backbone:
        model.backbone.dilations = ((1, 2),) * 4  # published ones pad a small map to many times its size
    if "size" in model.data_preprocessor:
        model.data_preprocessor.size = (SIDE, SIDE)  # to which mmseg pads
    few = {"nms_pre": 50, "max_per_img": 4}
    for stage in ("train_cfg", "test_cfg"):
        for key, part in _dicts(model.get(stage)):
            if key in ("rpn_proposal", "rpn"):
                part.update({k: v for k, v in few.items() if k in part or key == "rpn_proposal" or stage == "test_cfg"})
            if key == "sampler" and "num" in part:
                part.num = 4
            if key == "rcnn" and stage == "test_cfg":
                part.update(max_per_img=2, score_thr=0.0)
    if model.type in ("RetinaNet", "FCOS", "ATSS"):
        model.test_cfg.update(nms_pre=50, max_per_img=4, score_thr=0.0)
    if model.type in ("DINO", "FocusDETR"):
        model.num_queries = model.test_cfg.max_per_img = 10
        model.encoder.num_layers = model.decoder.num_layers = 1
        model.dn_cfg.group_cfg.num_dn_queries = 4
    if model.type == "FocusDETR":
        model.update(keep_ratios=[0.8], num_dual_tokens=9)
    if model.type == "ViDT":
        model.backbone.num_tokens = model.test_cfg.max_per_img = 10
        model.decoder.num_layers = 1
    if (kind := model.get("decode_head", {}).get("type")) in ("Mask2FormerHead", "ExitMask2FormerHead"):
        model.decode_head.num_queries = 5
        model.decode_head.transformer_decoder.num_layers = 1
        model.decode_head.pixel_decoder.encoder.num_layers = 2 if "Exit" in kind else 1
        model.decode_head.train_cfg.num_points = 64
    return cfg


def _dicts(node: Any, key: str = ""):
    if isinstance(node, dict):
        yield key, node
        for name, value in node.items():
            yield from _dicts(value, name)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _dicts(value, key)


def inputs(cfg: Config) -> dict[str, Any]:
    """Two images with labels, as the data loader gives them."""
    init_default_scope(cfg.default_scope)
    classes = min(head.num_classes for head in heads(cfg))
    if cfg.default_scope == "mmdet":
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            2, [(3, SIDE, SIDE), (3, SIDE, SIDE - 8)], num_items=[2, 1], num_classes=classes, with_mask=True
        )
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    images, samples = [], []
    for _ in range(2):
        images.append(torch.randint(0, 256, (3, SIDE, SIDE), generator=generator).to(torch.uint8))
        sample = SegDataSample(
            metainfo={"ori_shape": (SIDE, SIDE), "img_shape": (SIDE, SIDE), "pad_shape": (SIDE, SIDE)}
        )
        labels = torch.randint(0, classes, (1, SIDE // 8, SIDE // 8), generator=generator).repeat_interleave(8, 1)
        sample.gt_sem_seg = PixelData(data=labels.repeat_interleave(8, 2))
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}
