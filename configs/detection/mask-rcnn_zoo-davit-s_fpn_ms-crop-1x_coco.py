"""Mask R-CNN 1x with multi-scale crops, DaViT-S.

Paper: DaViT, arXiv:2204.03645.
Settings: mmdet/configs of dingmyu/davit, where only the tiny size is.
Published: box AP 47.7, mask AP 42.9. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-davit-s_fpn_ms-crop-1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_ms-crop-1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_davit_s"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True))
