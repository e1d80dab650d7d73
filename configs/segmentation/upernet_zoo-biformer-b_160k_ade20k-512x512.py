"""UPerNet, BiFormer-B.

Paper: BiFormer, arXiv:2303.08810.
Settings: semantic_segmentation/configs/ade20k of rayleizhu/BiFormer at 1697bbb, but for the backbone's batch norms,
    which the authors synchronize.
Published: mIoU 51.0, 51.7 with test-time augmentation. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-biformer-b_160k_ade20k-512x512.py
    --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_biformer_b"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.4, regions=8, out_norm=dict(type="LN2d", eps=1e-6)),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
