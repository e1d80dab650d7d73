"""ViDT, Swin-nano, from random weights on your own data.

Command: python tools/train.py configs/detection/vidt_zoo-swin-n_tiny.py --dataset FILE.yaml
Hardware: one GPU. Published: none; on 100 images of COCO see docs/overfit.md.

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/vidt_tiny.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_swin_n"
model = dict(
    backbone=dict(name=backbone),
    neck=dict(in_channels=[*feature_channels(backbone, (1, 2, 3)), 256]),
)
