"""Mask R-CNN 3x, InLine-Swin-T.

Paper: InLine, arXiv:2412.06590.
Settings: no code published; those of the host, configs/swin of Swin-Transformer-Object-Detection at c7b20110.
Published: in the paper, not in the authors' repository. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-inline-swin-t_fpn_ms-crop-3x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_ms-crop-3x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_inline_swin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, pretrained=False, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
