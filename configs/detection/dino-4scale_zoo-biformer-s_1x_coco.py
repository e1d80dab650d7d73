"""DINO with 4 scales 1x, BiFormer-S.

Paper: BiFormer, arXiv:2303.08810.
Settings: mmdet's for ResNet-50.
Published: none. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/dino-4scale_zoo-biformer-s_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/dino_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_biformer_s"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, regions=16, norm_eval=True, out_norm=dict(type="LN2d", eps=1e-6)),
    neck=dict(in_channels=feature_channels(backbone, (1, 2, 3))),
)
