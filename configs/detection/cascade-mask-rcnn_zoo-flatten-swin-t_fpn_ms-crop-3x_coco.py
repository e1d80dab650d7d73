"""Cascade Mask R-CNN 3x, FLatten-Swin-T.

Paper: FLatten Transformer, arXiv:2308.00442.
Settings: no code published; those of the host, configs/swin of Swin-Transformer-Object-Detection at c7b20110.
Published: box AP 50.8, mask AP 44.1. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/detection/cascade-mask-rcnn_zoo-flatten-swin-t_fpn_ms-crop-3x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/cascade-mask-rcnn_ms-crop-3x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_flatten_swin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
