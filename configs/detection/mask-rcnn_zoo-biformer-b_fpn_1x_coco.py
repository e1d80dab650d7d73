"""Mask R-CNN 1x, BiFormer-B.

Paper: BiFormer, arXiv:2303.08810.
Settings: object_detection/configs/coco of rayleizhu/BiFormer at 1697bbb.
Published: box AP 48.6, mask AP 43.7. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-biformer-b_fpn_1x_coco.py --amp

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_biformer_b"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.3, regions=16, norm_eval=True, out_norm=dict(type="LN2d", eps=1e-6)),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))))
