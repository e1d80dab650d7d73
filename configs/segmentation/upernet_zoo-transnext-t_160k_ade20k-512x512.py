"""UPerNet, TransNeXt-Tiny.

Paper: TransNeXt, arXiv:2311.17132.
Settings: segmentation/upernet of DaiShiResearch/TransNeXt at c8a9974.
Published: mIoU 51.1, 51.5 at several scales (51.7 with biases that are not interpolated). Not run here.
Hardware: 8 GPUs × 2 images.
Command: torchrun --nproc-per-node 8 tools/train.py configs/segmentation/upernet_zoo-transnext-t_160k_ade20k-512x512.py

Made by `make configs` from configs/dense.yaml: edit that.
"""

_base_ = "_base_/upernet_160k.py"
from visionzoo.openmmlab import feature_channels

backbone = "zoo_transnext_tiny"
model = dict(
    backbone=dict(
        name=backbone, drop_path_rate=0.4, pretrained=False, img_size=512, pretrain_size=224, interpolate_bias=True
    ),
    decode_head=dict(in_channels=feature_channels(backbone)),
    auxiliary_head=dict(in_channels=feature_channels(backbone)[2]),
)
