"""Mask R-CNN 1x with multi-scale crops, FLatten-Swin-T.

Paper: FLatten Transformer, arXiv:2308.00442.
Settings: no code published; those of the host, configs/swin of Swin-Transformer-Object-Detection at c7b20110.
Published: box AP 44.2, mask AP 40.2. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/detection/mask-rcnn_zoo-flatten-swin-t_fpn_ms-crop-1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_ms-crop-1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_flatten_swin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
