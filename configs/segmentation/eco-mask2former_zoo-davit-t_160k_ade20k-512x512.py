"""Mask2Former with exits in its encoder (ECO-M2F, arXiv:2404.15244), DaViT-T.

Paper: DaViT, arXiv:2204.03645.
Settings: mmseg's for ResNet-50 without exits; the factors of the exits' losses are ours. Afterwards visionzoo fit-gate
    fits the gate.
Published: none. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py
    configs/segmentation/eco-mask2former_zoo-davit-t_160k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/eco-mask2former_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_davit_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.3, out_norm=dict(type="LN2d")),
    decode_head=dict(in_channels=feature_channels(backbone)),
)
