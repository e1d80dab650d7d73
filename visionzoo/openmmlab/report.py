"""The table and the contact sheet of `visionzoo overfit`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from visionzoo.text import markdown_table

COLUMNS = {
    "coco/bbox_mAP": "box AP",
    "coco/bbox_mAP_50": "box AP50",
    "coco/segm_mAP": "mask AP",
    "mIoU": "mIoU",
    "aAcc": "pixel accuracy",
}
PICTURES = 6
WIDTH = 320  # pixels of a picture in the sheet


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of metrics on the training images, and what they were measured with."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    measured = f"{device}, Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items())
    lines = []
    for row in rows:
        values = [
            f"{row[key]:.3f}" if "coco" in key else f"{row[key]:.1f}" if key in row else "" for key in _present(row)
        ]
        last = [f"{row.get('loss', float('nan')):.3f}", row.get("update", ""), f"{row['seconds']:.0f}"]
        lines.append([f"`{row['run']}`", *values, *last])
    header = ["run", *COLUMNS.values(), "last loss logged", "of update", "seconds"]
    return f"{measured}.\n\n{markdown_table(header, lines)}\n"


def _present(row: Mapping[str, Any]) -> list[str]:
    return [key if key in row else "" for key in COLUMNS]


def contact_sheet(output: Path, runs: Sequence[str], data: Mapping[str, Path], path: Path) -> None:
    """Draw the predictions of each run on the same few training images: a row a run."""
    import json

    from visionzoo.openmmlab.flags import predict_parser
    from visionzoo.openmmlab.prediction import predict

    images = Path(json.loads(data["detection"].read_text())["train"]["images"])
    chosen = sorted(images.glob("*.jpg"))[3::15][:PICTURES]
    rows = [("images", chosen)]
    for run in runs:
        checkpoints = sorted((output / run).glob("*.pth"), key=lambda file: file.stat().st_mtime)
        configs = list((output / run).glob("*.py"))
        if not checkpoints or not configs:
            continue
        flags = [
            str(configs[0]),
            *map(str, chosen),
            "--checkpoint",
            str(checkpoints[-1]),
            "--output",
            str(output / "pictures" / run),
        ]
        predict(predict_parser().parse(flags))
        rows.append((run, [next((output / "pictures" / run / "vis").glob(f"{image.stem}.*")) for image in chosen]))
    height = WIDTH * 3 // 4
    sheet = Image.new("RGB", (WIDTH * len(chosen), (height + 18) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (title, pictures) in enumerate(rows):
        draw.text((4, y * (height + 18) + 3), title, "black")
        for x, picture in enumerate(pictures):
            small = Image.open(picture).convert("RGB")
            small.thumbnail((WIDTH - 4, height))
            sheet.paste(small, (x * WIDTH, y * (height + 18) + 18))
    sheet.save(path, quality=85)
