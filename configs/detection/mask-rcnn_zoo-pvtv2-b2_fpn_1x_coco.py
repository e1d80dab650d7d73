"""Mask R-CNN 1x, PVTv2-B2.

Paper: PVTv2, arXiv:2106.13797.
Settings: detection/configs of whai362/PVT at 57e2dfa.
Published: box AP 45.3, mask AP 41.2. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-pvtv2-b2_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_pvtv2_b2"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
