"""Mask R-CNN 1x, LITv2-S.

Paper: LITv2, arXiv:2205.13213.
Settings: detection/configs/litv2 of ziplab/LITv2 at 7501c86.
Published: box AP 44.9, mask AP 40.8; 44.7 and 40.7 with window_sizes=(0, 0, 4, 1), which is faster. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-litv2-s_fpn_1x_coco.py --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_litv2_s"
norm = dict(type="LN2d")
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, pretrained=False, out_norm=[None, norm, norm, norm]),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=1e-4), paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0)))
)
