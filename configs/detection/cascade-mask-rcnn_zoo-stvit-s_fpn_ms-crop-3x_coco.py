"""Cascade Mask R-CNN 3x, STViT-S.

Paper: STViT, arXiv:2211.11167.
Settings: the authors published no code for detection; these are Swin's, with norms on the maps as there.
Published: in the paper; only its best (box AP 53.9, mask AP 46.8) are in the authors' README. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/detection/cascade-mask-rcnn_zoo-stvit-s_fpn_ms-crop-3x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/cascade-mask-rcnn_ms-crop-3x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_stvit_s"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, pretrained=False, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
