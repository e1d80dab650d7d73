"""Focus-DETR, BiFormer-T, from random weights on your own data.

Command: python tools/train.py configs/detection/focus-detr_zoo-biformer-t_tiny.py --dataset FILE.yaml
Hardware: one GPU. Published: none; on 100 images of COCO see docs/overfit.md.

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/focus_detr_tiny.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_biformer_t"
model = dict(
    backbone=dict(name=backbone, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone, (1, 2, 3))),
)
