"""Cascade Mask R-CNN with SDANet's neck 1x, Swin-T.

Paper: Swin, arXiv:2103.14030.
Settings: configs/cascade_mask_rcnn_r101_with_R0R1.py of lutao2021/PIDray at 2acc524, for ResNet-101, but for the
    optimizer; the number of GPUs is not stated.
Published: none for this backbone. Not run here.
Hardware: 8 GPUs × 4 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/cascade-mask-rcnn-sdanet_zoo-swin-t_1x_pidray.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/cascade-mask-rcnn_sdanet_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_swin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
