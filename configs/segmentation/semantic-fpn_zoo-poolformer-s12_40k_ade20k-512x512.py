"""Semantic FPN, 40,000 iterations, PoolFormer-S12.

Paper: MetaFormer, arXiv:2111.11418.
Settings: segmentation/configs/sem_fpn/PoolFormer of sail-sg/poolformer.
Published: mIoU 37.2. Not run here.
Hardware: 8 GPUs × 4 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/segmentation/semantic-fpn_zoo-poolformer-s12_40k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/semantic-fpn_40k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_poolformer_s12"
model = dict(
    backbone=dict(name=backbone, out_norm=dict(type="GN", num_groups=1)),
    neck=dict(in_channels=feature_channels(backbone)),
)
