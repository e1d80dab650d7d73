"""Fit detectors and segmentors to a hundred images: visionzoo overfit --coco DIR --masks DIR [--jobs N].

A training from random weights that reaches box AP 0.5 and mIoU 0.6 on its own training images shows that data, ops,
backbone, heads, losses and metrics fit together; it says nothing about other images. Every configuration is a process
of its own (`visionzoo train CONFIG.py --dataset ...`). Writes a table and a contact sheet of predictions.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from visionzoo.engine import UserError
from visionzoo.engine.checkpoints import make_folder
from visionzoo.engine.configs import PACKAGE, shipped_configs
from visionzoo.engine.flags import COUNT

RUNS = {
    "mask-rcnn_zoo-biformer-t_fpn_tiny": "coco/bbox_mAP",
    "mask-rcnn_zoo-davit-t_fpn_tiny": "coco/bbox_mAP",
    "retinanet_zoo-biformer-t_fpn_tiny": "coco/bbox_mAP",
    "retinanet_zoo-davit-t_fpn_tiny": "coco/bbox_mAP",
    "retinanet-bvr_zoo-davit-t_fpn_tiny": "coco/bbox_mAP",
    "retinanet-sdanet_zoo-davit-t_tiny": "coco/bbox_mAP",
    "focus-detr_zoo-davit-t_tiny": "coco/bbox_mAP",
    "vidt_zoo-swin-n_tiny": "coco/bbox_mAP",
    "semantic-fpn_zoo-biformer-t_tiny": "mIoU",
    "upernet_zoo-biformer-t_tiny": "mIoU",
}
WANTED = {"coco/bbox_mAP": 0.5, "mIoU": 60.0}


def main() -> None:
    """Parse, describe the data, train, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", required=True, help="folder in COCO's layout; its training images are taken")
    parser.add_argument(
        "--masks", required=True, help="folder with annotations/training/*.png of the same images and classes.json"
    )
    parser.add_argument(
        "--runs", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--jobs", type=COUNT, default=1, help="trainings at once, spread over the GPUs (default: 1)")
    parser.add_argument("--output", default="output/overfit", help="folder (default: %(default)s)")
    parser.add_argument("--amp", action="store_true", help="mixed precision on a GPU")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes of all configs")
    args = parser.parse_args()
    output = Path(args.output)
    make_folder(output)
    data = describe_data(Path(args.coco).resolve(), Path(args.masks).resolve(), output)
    seconds = train_all(args, data, output)
    rows = [row(name, output, seconds[name]) for name in args.runs]
    from visionzoo.openmmlab.report import contact_sheet, table  # after the trainings, which need the memory

    text = table(rows)
    (output / "overfit.md").write_text(text)
    contact_sheet(output, args.runs, data, output / "overfit.jpg")
    print(text)
    if short := [f"{r['run']}: {r['metric']} {r['value']:.4g}" for r in rows if r["value"] < WANTED[r["metric"]]]:
        raise UserError("below the target: " + ", ".join(short))


def describe_data(coco: Path, masks: Path, output: Path) -> dict[str, Path]:
    """Write the descriptions of the data that visionzoo train takes; both splits are the training images."""
    images, annotations = coco / "train2017", coco / "annotations/instances_train2017.json"
    for path in (images, annotations, masks / "annotations/training", masks / "classes.json"):
        if not path.exists():
            raise UserError(f"expected {path}, it is not there")
    split = {"images": str(images), "annotations": str(annotations)}
    detection = {"root": str(coco), "train": split, "val": split}
    split = {"images": str(images), "masks": str(masks / "annotations/training")}
    classes = json.loads((masks / "classes.json").read_text())
    segmentation = {"root": str(masks), "train": split, "val": split, "classes": classes, "zero_is_unlabeled": True}
    paths = {"detection": output / "detection.yaml", "segmentation": output / "segmentation.yaml"}
    for name, content in (("detection", detection), ("segmentation", segmentation)):
        paths[name].write_text(json.dumps(content))  # JSON is YAML
    return paths


def task_of(name: str) -> str:
    """Return the folder of a configuration."""
    return shipped_configs()[name].parent.name


def train_all(args: argparse.Namespace, data: dict[str, Path], output: Path) -> dict[str, float]:
    """Run all trainings, `--jobs` at once, and return how long each took."""
    waiting, seconds = list(args.runs), {}
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    gpus = torch.cuda.device_count()
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            options = [*args.cfg_options, "train_dataloader.num_workers=2", "default_hooks.logger.interval=100"]
            command = [sys.executable, "-m", "visionzoo", "train", str(shipped_configs()[name])]
            command += ["--dataset", str(data[task_of(name)]), "--work-dir", str(output / name), "--seed", "0"]
            command += ["--amp"] * args.amp
            log = (output / f"{name}.log").open("w")
            path = os.pathsep.join([str(PACKAGE.parent), *sys.path])
            environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
            if gpus > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str(args.runs.index(name) % gpus)
            process = subprocess.Popen(
                [*command, "--cfg-options", *options], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            running[name] = (process, time.monotonic())
        time.sleep(1)
        for name, (process, start) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            seconds[name] = time.monotonic() - start
            print(f"{name}: exit code {process.returncode} after {seconds[name]:.0f} s", flush=True)
            if process.returncode:
                print(*(output / f"{name}.log").read_text().splitlines()[-15:], sep="\n", flush=True)
    return seconds


def row(name: str, output: Path, seconds: float) -> dict:
    """Return the last metrics of a training; 0 where it failed."""
    metrics: dict = {}
    for path in sorted((output / name).glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            values = json.loads(line)
            metrics |= values | ({"update": values["step"]} if "loss" in values else {})
    metric = "coco/bbox_mAP" if task_of(name) == "detection" else "mIoU"
    return {"run": name, "metric": metric, "value": metrics.get(metric, 0.0), "seconds": seconds, **metrics}
