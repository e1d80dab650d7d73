"""UPerNet, Twins-PCPVT-S.

Paper: Twins, arXiv:2104.13840.
Settings: segmentation/configs of Meituan-AutoML/Twins at c1ff671.
Published: mIoU 46.2, 47.5 with test-time augmentation. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-pcpvt-s_160k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_pcpvt_s"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
