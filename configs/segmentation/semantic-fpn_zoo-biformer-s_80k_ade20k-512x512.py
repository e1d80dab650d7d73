"""Semantic FPN, 80,000 iterations, BiFormer-S.

Paper: BiFormer, arXiv:2303.08810.
Settings: semantic_segmentation/configs/ade20k of rayleizhu/BiFormer at 1697bbb, but for the backbone's batch norms,
    which the authors synchronize.
Published: mIoU 48.9. Not run here.
Hardware: 8 GPUs × 4 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/segmentation/semantic-fpn_zoo-biformer-s_80k_ade20k-512x512.py --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/semantic-fpn_80k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_biformer_s"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.15, regions=8, out_norm=dict(type="LN2d", eps=1e-6)),
    neck=dict(in_channels=feature_channels(backbone)),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-8, by_epoch=False, begin=0, end=80000),
]
