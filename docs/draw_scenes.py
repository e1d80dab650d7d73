"""Draw docs/scenes.jpg: what the demo's detector finds, and where its routed attention looks.

python docs/draw_scenes.py WORK_DIR/epoch_12.pth, after `make demo-detection` (or
`visionzoo train mask-rcnn_zoo-biformer_fpn_digits --seed 0`).
"""

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from mmdet.apis import inference_detector, init_detector
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import nms

import visionzoo.openmmlab  # noqa: F401  makes the backbones known
from visionzoo.data import scenes_folder
from visionzoo.engine.configs import find_config
from visionzoo.layers.mixers import routed

SCENES = ("0001", "0004", "0006", "0009")  # of the validation split
SCALE, GAP, SURE = 2, 10, 0.5
STAGE = 1  # its routed mixer: 4x4 regions, each attends to 4
INK = (255, 200, 60)


def main() -> None:
    """Run the detector, draw two rows: boxes; the regions that the best box's own region attends to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("scenes.jpg"))
    args = parser.parse_args()
    model = init_detector(find_config("mask-rcnn_zoo-biformer_fpn_digits"), str(args.checkpoint), device="cpu")
    columns = [column(model, scenes_folder() / f"images/validation/{name}.png") for name in SCENES]
    width, height = columns[0][0].size
    sheet = Image.new("RGB", (len(columns) * (width + GAP) - GAP, 2 * height + GAP), "white")
    for i, pictures in enumerate(columns):
        for j, picture in enumerate(pictures):
            sheet.paste(picture, (i * (width + GAP), j * (height + GAP)))
    sheet.save(args.write, quality=88)


def column(model: Any, path: Path) -> tuple[Image.Image, Image.Image]:
    """Return the two pictures of a scene."""
    chosen = []  # regions by the routed mixers, in their order

    def note(q: Tensor, k: Tensor, **options: Any) -> Tensor:
        chosen.append(route(q, k, **options))
        return chosen[-1]

    route = routed.route_regions
    with mock.patch.object(routed, "route_regions", note):
        found = inference_detector(model, str(path)).pred_instances
    index = chosen[STAGE]
    scene = Image.open(path).convert("RGB")
    scene = scene.resize((scene.width * SCALE, scene.height * SCALE), Image.Resampling.BICUBIC)
    boxes, looks = scene.copy(), scene.copy()
    draw = ImageDraw.Draw(boxes)
    font = ImageFont.load_default(16)
    best = nms(found.bboxes, found.scores, 0.5)  # of boxes of several classes on one digit the surest
    for i in best.tolist():
        if (score := float(found.scores[i])) >= SURE:
            box, label = found.bboxes[i].tolist(), int(found.labels[i])
            left, top, right, bottom = (SCALE * side for side in box)
            draw.rectangle((left, top, right, bottom), outline=INK, width=3)
            draw.text((left, max(top - 20, 0)), f"{label} {score:.0%}", fill=INK, font=font)
    left, top, right, bottom = found.bboxes[0].tolist()
    x, y = (left + right) / 2, (top + bottom) / 2
    side = round(index.shape[1] ** 0.5)
    cell = scene.width / side
    own = int(y * SCALE // cell) * side + int(x * SCALE // cell)
    seen = set(index[0, own].flatten().tolist())
    pixels = np.asarray(looks, np.float32)
    for region in range(side * side):
        if region not in seen:
            rows, cols = slice(*_span(region // side, cell)), slice(*_span(region % side, cell))
            pixels[rows, cols] *= 0.3
    looks = Image.fromarray(pixels.astype("uint8"))
    draw = ImageDraw.Draw(looks)
    for region in seen:
        top, left = (region // side) * cell, (region % side) * cell
        draw.rectangle((left + 1, top + 1, left + cell - 2, top + cell - 2), outline=(110, 190, 255), width=2)
    draw.ellipse((x * SCALE - 7, y * SCALE - 7, x * SCALE + 7, y * SCALE + 7), fill=INK)
    return boxes, looks


def _span(number: int, cell: float) -> tuple[int, int]:
    return round(number * cell), round((number + 1) * cell)


if __name__ == "__main__":
    main()
