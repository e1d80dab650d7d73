"""RetinaNet 1x, LeViT-256.

Paper: LeViT, arXiv:2104.01136.
Settings: SHViT's.
Published: none. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/retinanet_zoo-levit-256_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/retinanet_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_levit_256"
model = dict(
    backbone=dict(name=backbone, out_indices=(0, 1, 2), norm_eval=True),
    neck=dict(
        _delete_=True,
        type="UpsamplingFPN",
        in_channels=feature_channels(backbone),
        out_channels=256,
        num_outs=5,
        num_upsamples=1,
        add_extra_convs=True,
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(position_decay_mult=0.0))
