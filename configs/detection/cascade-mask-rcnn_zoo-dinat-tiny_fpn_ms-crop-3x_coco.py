"""Cascade Mask R-CNN 3x, DiNAT-Tiny.

Paper: DiNAT, arXiv:2209.15001.
Settings: detection/configs/dinat of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b.
Published: box AP 52.2, mask AP 45.1. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/detection/cascade-mask-rcnn_zoo-dinat-tiny_fpn_ms-crop-3x_coco.py --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/cascade-mask-rcnn_ms-crop-3x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_dinat_tiny"
model = dict(
    backbone=dict(
        name=backbone,
        drop_path_rate=0.3,
        dilations=((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1)),
        out_norm=dict(type="LN2d"),
    ),
    neck=dict(in_channels=feature_channels(backbone)),
)
