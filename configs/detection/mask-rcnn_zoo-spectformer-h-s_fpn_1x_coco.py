"""Mask R-CNN 1x, SpectFormer-H-S.

Paper: SpectFormer, arXiv:2304.06446.
Settings: the authors published no code for detection; these are PVTv2's, with a norm on the last map, which has none.
Published: in the paper; the authors' README has no numbers. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-spectformer-h-s_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_spectformer_h_s"
norm = dict(type="LN2d", eps=1e-6)
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, pretrained=False, out_norm=[None, None, None, norm]),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
