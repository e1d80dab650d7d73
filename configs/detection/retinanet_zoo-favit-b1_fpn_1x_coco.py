"""RetinaNet 1x, FaViT-B1.

Paper: FaViT, arXiv:2312.08614.
Settings: detection/configs of q2479036243/FaViT until 679b564, which removed it; those of B0, B2 and B3 differ only in
    the backbone.
Published: in the paper, not in the authors' repository. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/retinanet_zoo-favit-b1_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/retinanet_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_favit_b1"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, pretrained=False),
    neck=dict(in_channels=feature_channels(backbone, (1, 2, 3))),
)
