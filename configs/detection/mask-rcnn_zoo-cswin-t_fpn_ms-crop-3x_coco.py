"""Mask R-CNN 3x, CSWin-T.

Paper: CSWin, arXiv:2107.00652.
Settings: README.md of microsoft/CSWin-Transformer at f111ae2; the configs are not published, these are Swin's.
Published: box AP 49.0, mask AP 43.6. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-cswin-t_fpn_ms-crop-3x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_ms-crop-3x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_cswin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
