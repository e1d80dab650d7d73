"""Semantic FPN, 80,000 iterations, LITv2-B.

Paper: LITv2, arXiv:2205.13213.
Settings: segmentation/configs/litv2 of ziplab/LITv2 at 7501c86.
Published: mIoU 47.2. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/semantic-fpn_zoo-litv2-b_80k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/semantic-fpn_80k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_litv2_b"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.3, pretrained=False, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
train_dataloader = dict(batch_size=2)
