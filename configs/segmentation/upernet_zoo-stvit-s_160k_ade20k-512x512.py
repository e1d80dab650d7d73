"""UPerNet, STViT-S.

Paper: STViT, arXiv:2211.11167.
Settings: the authors published no code for segmentation; these are Swin's, with norms on the maps as there.
Published: in the paper; only its best (mIoU 51.9) is in the authors' README. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-stvit-s_160k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_stvit_s"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, pretrained=False, out_norm=dict(type="LN2d")),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
