"""Cascade Mask R-CNN 3x, FcaFormer-L2.

Paper: FcaFormer, arXiv:2211.07198.
Settings: object_detection/configs of hkzhang-git/FcaFormer at 7dcd8e0. The 1×1 convolutions to 96, 192, 384 and 768
    channels before the norms are left out here. Their learning rates fall by 0.7 for each of 6 groups of blocks, here
    by 0.85 for each of 13 blocks.
Published: box AP 51.0, mask AP 43.9. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/detection/cascade-mask-rcnn_zoo-fcaformer-l2_fpn_ms-crop-3x_coco.py --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/cascade-mask-rcnn_ms-crop-3x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_fcaformer_l2"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, pretrained=False, out_norm=dict(type="LN2d", eps=1e-6)),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(layer_decay=0.85))
