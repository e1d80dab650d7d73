"""ATSS with BVR, 20 epochs, Swin-T.

Paper: Swin, arXiv:2103.14030.
Settings: configs/bvr/atss_x101_dcn_fpn_relation_coco_2x.py of microsoft/RelationNet2 at 0930752, but for backbone and
    optimizer.
Published: none for this backbone; box AP 50.6 for ResNeXt-101 64×4d with deformable convolutions. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/atss-bvr_zoo-swin-t_fpn_20e_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/atss_bvr_20e.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_swin_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.2, out_norm=dict(type="LN2d")),
    neck=dict(in_channels=feature_channels(backbone, (1, 2, 3))),
)
