"""Cascade Mask R-CNN 3x, NAT-Tiny.

Paper: NAT, arXiv:2204.07143.
Settings: detection/configs/nat of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b.
Published: box AP 51.4, mask AP 44.5. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/detection/cascade-mask-rcnn_zoo-nat-tiny_fpn_ms-crop-3x_coco.py --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/cascade-mask-rcnn_ms-crop-3x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_nat_tiny"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.3, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
