"""RetinaNet 1x with multi-scale crops, L²ViT-T.

Paper: L²ViT, arXiv:2501.16182.
Settings: object_detection/configs/L2ViT of ChuanyangZheng/L2ViT at fad0341; L²ViT-B has drop_path_rate=0.2.
Published: in the paper, not in the authors' repository. Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/detection/retinanet_zoo-l2vit-t_fpn_ms-crop-1x_coco.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/retinanet_ms-crop-1x.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_l2vit_t"
model = dict(
    backbone=dict(name=backbone, drop_path_rate=0.1, pretrained=False, out_norm=dict(type="LN2d", eps=1e-5)),
    neck=dict(in_channels=feature_channels(backbone, (1, 2, 3))),
)
