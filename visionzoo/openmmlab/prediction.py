"""Boxes and masks drawn on pictures, with JSON beside them, by mmdet's and mmseg's inferencers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from visionzoo.engine.errors import UserError
from visionzoo.engine.page import serve
from visionzoo.openmmlab.checkpoints import check_fit
from visionzoo.openmmlab.config_errors import build
from visionzoo.openmmlab.configuring import task_of
from visionzoo.openmmlab.flags import PredictConfig
from visionzoo.openmmlab.running import check_windows, read_config, require_checkpoint, say_notes

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def predict(config: PredictConfig) -> list[Path]:
    """Predict every picture, write `vis/NAME` and `preds/NAME.json` into the output folder, and return the latter.

    JSON of a detector: labels, class names, scores, boxes (x1, y1, x2, y2 in pixels) and, where the model has them,
    masks as COCO's run lengths. Of a segmentor: the share of the picture that each class covers; the mask itself is
    `pred/NAME.png`, of class indices.

    Raises:
        UserError: if a picture, the config or the checkpoint is missing, cannot be read or does not fit.
    """
    cfg = read_config(config.config)
    check_windows(cfg)
    task = task_of(cfg)
    images = _images(config.images)
    checkpoint = require_checkpoint(config.checkpoint)
    if config.device and torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {config.device}: torch finds no GPU")
    output = Path(config.output)
    (output / "preds").mkdir(parents=True, exist_ok=True)
    cfg.model.backbone.pretrained = False  # the checkpoint has all weights
    run = _detect if task == "detection" else _segment
    written = run(config, cfg, checkpoint, images, output)
    print(f"{len(written)} pictures in {output / 'vis'}, JSON in {output / 'preds'}")
    return written


def _detect(config: PredictConfig, cfg: Any, checkpoint: str, images: list[str], output: Path) -> list[Path]:
    from mmdet.apis import DetInferencer

    inferencer = build(cfg, lambda: DetInferencer(model=cfg, weights=checkpoint, device=config.device))
    say_notes(check_fit(inferencer.model, checkpoint, cfg, None))
    inferencer(images, out_dir=str(output), pred_score_thr=config.score_threshold, no_save_pred=False)
    names = inferencer.model.dataset_meta["classes"]
    paths = []
    for image in images:
        path = output / "preds" / f"{Path(image).stem}.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({"classes": [names[label] for label in content["labels"]], **content}))
        paths.append(path)
    return paths


def _segment(config: PredictConfig, cfg: Any, checkpoint: str, images: list[str], output: Path) -> list[Path]:
    from mmseg.apis import MMSegInferencer

    inferencer = build(cfg, lambda: MMSegInferencer(model=cfg, weights=checkpoint, device=config.device))
    say_notes(check_fit(inferencer.model, checkpoint, cfg, None))
    meta = inferencer.model.dataset_meta
    names = meta["classes"] = meta.get("classes") or [str(n) for n in range(inferencer.model.decode_head.num_classes)]
    if len(meta.get("palette") or ()) != len(names):  # mmseg would end in an AssertionError
        say_notes([f"{checkpoint} does not have a colour for each of its classes; they are drawn in others"])
        meta["palette"] = np.random.RandomState(42).randint(0, 256, (len(names), 3)).tolist()
    (output / "pred").mkdir(exist_ok=True)
    paths = []
    for image in images:
        sample = inferencer(image, out_dir=str(output), return_datasamples=True)
        result = sample.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)  # a threshold's are floats
        Image.fromarray(result).save(output / "pred" / f"{Path(image).stem}.png")
        shares = dict(_shares(result, names))
        paths.append(output / "preds" / f"{Path(image).stem}.json")
        paths[-1].write_text(json.dumps({"image": image, "shares": shares}))
    return paths


def _images(paths: Sequence[str]) -> list[str]:
    images: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            images += sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            images.append(path)
        else:
            raise UserError(f"no picture at {path}")
    if not images:
        raise UserError(f"no pictures ({', '.join(SUFFIXES)}) in {', '.join(paths)}")
    names = [image.stem for image in images]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"pictures of the same name would overwrite each other's results: {', '.join(twice)}")
    for image in images:  # all, before the first is predicted: the inferencers stop in the middle, without its name
        if image.stat().st_size == 0 or cv2.imread(str(image)) is None:
            raise UserError(f"the picture {image} cannot be read; fix or remove it")
    return [str(image) for image in images]
