"""Mask R-CNN 1x, FLatten-PVT-T.

Paper: FLatten Transformer, arXiv:2308.00442.
Settings: no code published; those of the host, detection/configs of whai362/PVT at 57e2dfa.
Published: box AP 38.2, mask AP 37.0. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-flatten-pvt-t_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_flatten_pvt_t"
model = dict(
    backbone=dict(name=backbone),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
