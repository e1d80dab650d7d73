"""Cascade Mask R-CNN 3x, FFNet-2.

Paper: FFNet, arXiv:2406.02021.
Settings: detection/configs/coco of ysj9909/FFNet at f3c3e4c; FFNet-3 and FFNet-4 have drop_path_rate=0.6. Their
    learning rates fall by 0.8 for each of 12 groups of blocks, here by 0.89 for each of 24 blocks.
Published: box AP 51.8, mask AP 44.9, from distilled weights; FFNet-3 52.8 and 45.6, FFNet-4 53.4 and 45.9. Not run
    here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/detection/cascade-mask-rcnn_zoo-ffnet-2_fpn_ms-crop-3x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/cascade-mask-rcnn_ms-crop-3x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_ffnet_2"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.35, pretrained=False, out_norm=dict(type="LN2d", eps=1e-6)),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.89))
