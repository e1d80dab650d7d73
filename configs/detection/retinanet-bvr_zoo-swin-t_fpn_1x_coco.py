"""RetinaNet with BVR 1x, Swin-T.

Paper: Swin, arXiv:2103.14030.
Settings: configs/bvr/retinanet_r50_fpn_relation_coco_1x.py of microsoft/RelationNet2 at 0930752, but for backbone and
    optimizer.
Published: none for this backbone; box AP 38.5 for ResNet-50. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/retinanet-bvr_zoo-swin-t_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/retinanet_bvr_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_swin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone, (1, 2, 3))),
)
