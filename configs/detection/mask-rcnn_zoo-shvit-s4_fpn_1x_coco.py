"""Mask R-CNN 1x, SHViT-S4.

Paper: SHViT, arXiv:2401.16456.
Settings: downstream/configs of ysj9909/SHViT at 6a729cc.
Published: box AP 39.0, mask AP 35.9. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-shvit-s4_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_shvit_s4"
model = dict(
    backbone=dict(name=backbone, norm_eval=True),
    neck=dict(
        _delete_=True,
        type="UpsamplingFPN",
        in_channels=feature_channels(backbone),
        out_channels=256,
        num_outs=5,
        num_upsamples=2,
    ),
)
