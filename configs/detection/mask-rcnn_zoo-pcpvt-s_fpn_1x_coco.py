"""Mask R-CNN 1x, Twins-PCPVT-S.

Paper: Twins, arXiv:2104.13840.
Settings: detection/configs of Meituan-AutoML/Twins at c1ff671, PVT's.
Published: in the paper's table, not in the repository. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-pcpvt-s_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_pcpvt_s"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
