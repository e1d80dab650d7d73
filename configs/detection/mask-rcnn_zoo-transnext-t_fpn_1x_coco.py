"""Mask R-CNN 1x, TransNeXt-Tiny.

Paper: TransNeXt, arXiv:2311.17132.
Settings: detection/maskrcnn of DaiShiResearch/TransNeXt at c8a9974.
Published: box AP 49.9, mask AP 44.6. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-transnext-t_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_transnext_tiny"
model = dict(
    backbone=dict(
        name=backbone, drop_path_rate=0.4, pretrained=False, img_size=800, pretrain_size=224, interpolate_bias=True
    ),
    neck=dict(in_channels=feature_channels(backbone)),
)
