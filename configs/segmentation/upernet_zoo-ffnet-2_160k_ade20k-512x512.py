"""UPerNet, FFNet-2.

Paper: FFNet, arXiv:2406.02021.
Settings: segmentation/configs/ade20k of ysj9909/FFNet at f3c3e4c; FFNet-3 and FFNet-4 have drop_path_rate=0.3.
Published: mIoU 47.1, 47.8 with test-time augmentation; FFNet-3 49.6, FFNet-4 50.7. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-ffnet-2_160k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_ffnet_2"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, pretrained=False, out_norm=dict(type="LN2d", eps=1e-6)),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
