"""UPerNet, NAT-Mini.

Paper: NAT, arXiv:2204.07143.
Settings: segmentation/configs/nat of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b.
Published: mIoU 45.1, 46.4 with test-time augmentation. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-nat-mini_160k_ade20k-512x512.py
    --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_nat_mini"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, out_norm=dict(type="LN2d")),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
