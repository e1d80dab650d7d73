"""Mask R-CNN 3x, Swin-T.

Paper: Swin, arXiv:2103.14030.
Settings: configs/swin of Swin-Transformer-Object-Detection at c7b20110.
Published: box AP 46.0, mask AP 41.6. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-swin-t_fpn_ms-crop-3x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_ms-crop-3x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_swin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
