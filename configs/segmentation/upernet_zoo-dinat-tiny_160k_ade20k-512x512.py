"""UPerNet, DiNAT-Tiny.

Paper: DiNAT, arXiv:2209.15001.
Settings: segmentation/configs/dinat of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b.
Published: mIoU 47.8, 48.8 with test-time augmentation. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-dinat-tiny_160k_ade20k-512x512.py
    --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_dinat_tiny"
model = dict(
    backbone=dict(
        name=backbone,
        drop_path_rate=0.3,
        dilations=((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1)),
        out_norm=dict(type="LN2d"),
    ),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
