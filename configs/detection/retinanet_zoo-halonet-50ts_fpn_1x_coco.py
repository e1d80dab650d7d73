"""RetinaNet 1x, HaloNet-50-TS.

Paper: HaloNet, arXiv:2103.12731.
Settings: the base's.
Published: none. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/retinanet_zoo-halonet-50ts_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/retinanet_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_halonet_50ts"
model = dict(
    backbone=dict(name=backbone, norm_eval=True),
    neck=dict(in_channels=feature_channels(backbone, (1, 2, 3))),
)
