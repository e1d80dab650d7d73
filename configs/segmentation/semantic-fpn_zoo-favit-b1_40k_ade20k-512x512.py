"""Semantic FPN, 40,000 iterations, FaViT-B1.

Paper: FaViT, arXiv:2312.08614.
Settings: segmentation/configs/sem_fpn/FaViT of q2479036243/FaViT until 529b46b, which removed it; B2 and B3 have 80,000
    iterations with half the learning rate.
Published: in the paper, not in the authors' repository. Not run here.
Hardware: 8 GPUs × 8 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/semantic-fpn_zoo-favit-b1_40k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/semantic-fpn_40k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_favit_b1"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, pretrained=False),
    neck=dict(in_channels=feature_channels(backbone)),
)
optim_wrapper = dict(optimizer=dict(lr=2.4e-4, weight_decay=0.01))
train_dataloader = dict(batch_size=8)
