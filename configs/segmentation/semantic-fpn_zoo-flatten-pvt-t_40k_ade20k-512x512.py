"""Semantic FPN, 40,000 iterations, FLatten-PVT-T.

Paper: FLatten Transformer, arXiv:2308.00442.
Settings: no code published; those of the host, segmentation/configs of whai362/PVT at 57e2dfa.
Published: mIoU 37.21. Not run here.
Hardware: 8 GPUs × 4 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/segmentation/semantic-fpn_zoo-flatten-pvt-t_40k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/semantic-fpn_40k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_flatten_pvt_t"
model = dict(
    backbone=dict(name=backbone),
    neck=dict(in_channels=feature_channels(backbone)),
)
