"""UPerNet, L²ViT-T.

Paper: L²ViT, arXiv:2501.16182.
Settings: semantic_segmentation/configs/novel of ChuanyangZheng/L2ViT at fad0341.
Published: in the paper, not in the authors' repository. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-l2vit-t_160k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_l2vit_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.3, pretrained=False, out_norm=dict(type="LN2d", eps=1e-5)),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
