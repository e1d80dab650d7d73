"""Boxes and masks drawn on pictures, with JSON beside them, by mmdet's and mmseg's inferencers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from visionzoo.engine.checkpoints import make_folder, new_folder
from visionzoo.engine.errors import UserError
from visionzoo.engine.page import check_no_page, serve
from visionzoo.openmmlab.checkpoints import check_fit
from visionzoo.openmmlab.config_checks import check_boxes, check_windows
from visionzoo.openmmlab.config_errors import build
from visionzoo.openmmlab.configuring import task_of
from visionzoo.openmmlab.flags import PredictConfig, ViewConfig
from visionzoo.openmmlab.running import read_config, require_checkpoint, say_notes
from visionzoo.text import count_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def predict(config: PredictConfig) -> list[Path]:
    """Predict every picture, write `vis/NAME` and `preds/NAME.json` into the output folder, and return the latter.

    JSON of a detector: labels, class names, scores, boxes (x1, y1, x2, y2 in pixels) and, where the model has them,
    masks as COCO's run lengths. Of a segmentor: the share of the picture that each class covers; the mask itself is
    `pred/NAME.png`, of class indices.

    Raises:
        UserError: if a picture, the config or the checkpoint is missing, cannot be read or does not fit.
    """
    return _predict(config, Path(config.output))


def view(config: ViewConfig) -> None:
    """Show what a detector or segmentor sees in pictures (`visionzoo view CONFIG`): drawn into --save, or as a page.

    Raises:
        UserError: as `predict`; or the page cannot be served.
    """
    if config.save:
        if not config.images:
            raise UserError("--save: which images? name files or folders")
        check_no_page(config.page)
        _predict(config, Path(config.save))
        return
    cfg, images, checkpoint = _read(config)
    serve(OverlayViewer(config, cfg, checkpoint), [Path(image) for image in images], config.page.host, config.page.port)


def _predict(config: PredictConfig | ViewConfig, output: Path) -> list[Path]:
    cfg, images, checkpoint = _read(config)
    run = _detect if task_of(cfg) == "detection" else _segment
    with new_folder(output):
        make_folder(output / "preds")
        written = run(config, cfg, checkpoint, images, output)
    print(f"{count_of(len(written), 'picture')} in {output / 'vis'}, JSON in {output / 'preds'}")
    return written


class OverlayViewer:
    """A detector or segmentor, as the page shows it."""

    mode, upright = "RGB", False
    methods: Mapping[str, str] = {"overlay": "boxes and masks over the picture, as the model finds them"}

    def __init__(self, config: PredictConfig | ViewConfig, cfg: Any, checkpoint: str) -> None:
        self.title = Path(config.config).stem
        self._detects = task_of(cfg) == "detection"
        make = _detector if self._detects else _segmentor
        self._inferencer, self._names = make(config, cfg, checkpoint)
        self._threshold = config.score_threshold

    def look(self, picture: Image.Image) -> dict[str, Any]:
        """Return the boxes above the threshold, or the share of the picture of each class, largest first."""
        result, _ = self._infer(picture)
        if not self._detects:
            found = _shares(np.asarray(result), self._names)
        else:
            pairs = zip(result["labels"], result["scores"], strict=True)
            found = [(self._names[label], score) for label, score in pairs if score >= self._threshold]
        found = sorted(found, key=lambda each: -each[1])
        return {"classes": [{"name": name, "probability": float(share)} for name, share in found]}

    def seen(self, picture: Image.Image) -> bytes:
        """Return the picture as a PNG."""
        return _png(picture)

    def draw(self, picture: Image.Image, method: str, place: tuple[float, float] | None) -> tuple[bytes, str]:
        """Return the picture with what was found, as a PNG."""
        return _png(Image.fromarray(np.asarray(self._infer(picture)[1]))), self.methods[method]

    def _infer(self, picture: Image.Image) -> tuple[Any, Any]:
        """Return what is found, and the picture with it."""
        pixels = np.asarray(picture)[..., ::-1].copy()  # OpenMMLab reads BGR
        options = {"pred_score_thr": self._threshold} if self._detects else {}
        found = self._inferencer(pixels, return_vis=True, **options)
        results = found["predictions"], found["visualization"]
        return (results[0][0], results[1][0]) if self._detects else results  # mmseg has no list of one picture


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _read(config: PredictConfig | ViewConfig) -> tuple[Any, list[str], str]:
    """Return the config, the pictures, if any, and the checkpoint that `config` names, all there and fit to be used."""
    cfg = read_config(config.config)
    check_windows(cfg)
    check_boxes(cfg)
    images = _images(config.images) if config.images else []
    checkpoint = require_checkpoint(config.checkpoint)
    if config.device and torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {config.device}: torch finds no GPU")
    cfg.model.backbone.pretrained = False  # the checkpoint has all weights
    return cfg, images, checkpoint


def _detector(config: PredictConfig | ViewConfig, cfg: Any, checkpoint: str) -> tuple[Any, Any]:
    """Return mmdet's inferencer and the names of the classes."""
    from mmdet.apis import DetInferencer

    inferencer = build(cfg, lambda: DetInferencer(model=cfg, weights=checkpoint, device=config.device))
    say_notes(check_fit(inferencer.model, checkpoint, cfg, None))
    return inferencer, inferencer.model.dataset_meta["classes"]


def _segmentor(config: PredictConfig | ViewConfig, cfg: Any, checkpoint: str) -> tuple[Any, Any]:
    """Return mmseg's inferencer, with a color for each class, and the names of the classes."""
    from mmseg.apis import MMSegInferencer

    inferencer = build(cfg, lambda: MMSegInferencer(model=cfg, weights=checkpoint, device=config.device))
    say_notes(check_fit(inferencer.model, checkpoint, cfg, None))
    meta = inferencer.model.dataset_meta
    names = meta["classes"] = meta.get("classes") or [str(n) for n in range(inferencer.model.decode_head.num_classes)]
    if len(meta.get("palette") or ()) != len(names):  # mmseg would end in an AssertionError
        say_notes([f"{checkpoint} does not have a color for each of its classes; they are drawn in others"])
        meta["palette"] = np.random.RandomState(42).randint(0, 256, (len(names), 3)).tolist()
    return inferencer, names


def _shares(result: Any, names: Any) -> list[tuple[str, float]]:
    """Return the share of a mask of class numbers that each class covers."""
    labels, counts = np.unique(result, return_counts=True)
    return [(names[int(label)], int(count) / np.size(result)) for label, count in zip(labels, counts, strict=True)]


def _detect(
    config: PredictConfig | ViewConfig, cfg: Any, checkpoint: str, images: list[str], output: Path
) -> list[Path]:
    inferencer, names = _detector(config, cfg, checkpoint)
    inferencer(images, out_dir=str(output), pred_score_thr=config.score_threshold, no_save_pred=False)
    paths = []
    for image in images:
        path = output / "preds" / f"{Path(image).stem}.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({"classes": [names[label] for label in content["labels"]], **content}))
        paths.append(path)
    return paths


def _segment(
    config: PredictConfig | ViewConfig, cfg: Any, checkpoint: str, images: list[str], output: Path
) -> list[Path]:
    inferencer, names = _segmentor(config, cfg, checkpoint)
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
