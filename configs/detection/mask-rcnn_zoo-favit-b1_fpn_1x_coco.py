"""Mask R-CNN 1x, FaViT-B1.

Paper: FaViT, arXiv:2312.08614.
Settings: detection/configs of q2479036243/FaViT until 8a0a6ed, which removed it; B2 and B3 have 2 images a GPU and half
    the learning rate.
Published: in the paper, not in the authors' repository. Not run here.
Hardware: 8 GPUs × 4 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/mask-rcnn_zoo-favit-b1_fpn_1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/mask-rcnn_1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_favit_b1"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, pretrained=False),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
train_dataloader = dict(batch_size=4)
