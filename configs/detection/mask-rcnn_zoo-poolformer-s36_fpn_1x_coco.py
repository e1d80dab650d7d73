"""Mask R-CNN 1x, PoolFormer-S36.

Paper: MetaFormer, arXiv:2111.11418.
Settings: detection/configs of sail-sg/poolformer.
Published: box AP 41.0, mask AP 37.7. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-poolformer-s36_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_poolformer_s36"
model = dict(
    backbone=dict(name=backbone, out_norm=dict(type="GN", num_groups=1)),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
