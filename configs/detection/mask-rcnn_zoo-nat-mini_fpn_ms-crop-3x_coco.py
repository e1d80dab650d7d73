"""Mask R-CNN 3x, NAT-Mini.

Paper: NAT, arXiv:2204.07143.
Settings: detection/configs/nat of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b.
Published: box AP 46.5, mask AP 41.7. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-nat-mini_fpn_ms-crop-3x_coco.py
    --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_ms-crop-3x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_nat_mini"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
